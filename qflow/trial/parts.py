"""Parts of an analysis in worker processes: what the driver asks for, and how a worker answers.

Looks at batches for bad cases, and passes that measure rows of a sensitivity table, do not depend on each other. Each
part gives the same numbers in any process, so the tables are those of one process, bit for bit. Parts and answers are
plain data. A part that no worker answers is computed by the driver itself, and a line says why.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from qflow.analysis.badcases.looks import Seen
from qflow.analysis.sensitivity.parts import Part
from qflow.core.errors import TrialError

AHEAD = 4  # parts for each worker that are begun before the first of them is taken in
Answer = Mapping[str, Any]


class Asked(Protocol):
    """A part that a worker computes."""

    def result(self) -> Answer:
        """Wait for the answer; `reason` in it says why there is none. Raises TrialError."""


class Workers(Protocol):
    """Computes parts in other processes."""

    @property
    def workers(self) -> int:
        """How many parts are computed at once."""

    def ask(self, task: Mapping[str, Any]) -> Asked:
        """Begin a part."""


@dataclass
class Asking:
    """Asks for parts of one analysis, in all of which `about` is the same, until one is not answered."""

    workers: Workers
    about: Mapping[str, Any]
    say: Callable[[str], None]
    refused: bool = False

    def answers(self, parts: Iterable[Any]) -> Iterator[Answer]:
        """Yield the answers in the order of the parts; end early, and say why, if there is none."""
        waiting = deque[Asked]()
        for part in () if self.refused else parts:
            waiting.append(self.workers.ask({"about": self.about, "part": part}))
            if len(waiting) >= AHEAD * self.workers.workers:
                if (answer := self._answer(waiting.popleft())) is None:
                    return
                yield answer
        while waiting and (answer := self._answer(waiting.popleft())) is not None:
            yield answer

    def _answer(self, asked: Asked) -> Answer | None:
        if self.refused:
            return None
        try:
            answer = asked.result()
            reason = answer.get("reason")
        except TrialError as error:
            reason = str(error)
        if reason is None:
            return answer
        self.refused = True
        self.say(f"{self.about['stage']:<12} computed by the study's own process: {reason}")
        return None

    def looks(self, steps: int, done: int) -> Iterator[Seen]:
        """Yield the looks at the batches after the first `done`."""
        return (Seen.of(answer) for answer in self.answers(range(done, steps)))

    def rows(self, whole: Part, on_share: Callable[[float], None]) -> Sequence[Answer] | None:
        """Return what the parts of a whole give, or None."""
        of = min(AHEAD * self.workers.workers, len(whole.chosen))
        found = []
        for answer in self.answers(vars(replace(whole, index=i, of=of)) for i in range(of)):
            found.append(answer)
            on_share(len(found) / of)
        return found if len(found) == of else None


@dataclass
class Answering:
    """Answers parts in a worker. What the parts of an analysis share is made with the first of them."""

    begin: Callable[[Mapping[str, Any], ExitStack], Callable[[Any], Answer]]
    """Makes it; leaves on the stack what undoes it."""
    _about: Mapping[str, Any] | None = None
    _stack: ExitStack = field(default_factory=ExitStack)
    _answer: Callable[[Any], Answer] | None = None

    def __call__(self, task: Mapping[str, Any]) -> Answer:
        """Answer a part."""
        if self._answer is None or task["about"] != self._about:
            self.leave()
            self._about, self._answer = task["about"], self.begin(task["about"], self._stack)
        return self._answer(task["part"])

    def leave(self) -> None:
        """Undo what the last analysis needed, for whatever comes next."""
        self._stack.close()
        self._about = self._answer = None
