"""A pool of workers, each of which handles one task at a time: who gets a task, deaths, retries and timeouts.

What a worker is, a backend says: a process of this machine (processes.py) or of a node of a Ray cluster (ray_nodes.py).
Tasks and answers are JSON: nothing but plain data passes in either direction. A task may name a folder under `folder`,
into which its handler writes files; a worker elsewhere has another folder there, and its files come back. What all
tasks share may name a folder under `cache` in the same way.
"""

from __future__ import annotations

import json
import math
import time
from collections import deque
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

from qflow.core.errors import TrialError

Answer: TypeAlias = dict[str, Any]
Handle: TypeAlias = Callable[[Mapping[str, Any]], Answer]
Make: TypeAlias = Callable[[Mapping[str, Any]], Handle]
"""A function of a module, which every worker calls once with what all tasks share; it returns what handles a task."""
GLANCE = 1.0  # seconds after which a wait looks whether a worker is alive that cannot say anything any more
STARTS = 60.0  # seconds without a worker, after which that is said


class Died(Exception):
    """A worker has ended before it answered; the text says how."""


class Worker(Protocol):
    """What handles tasks; it says `ready` first, and then one answer to each task."""

    def send(self, task: bytes, folder: Path | None) -> None:
        """Hand it a task; the files of the task are to be in `folder` with the answer."""

    def receive(self) -> bytes:
        """Return what it has said. Raises Died, or TrialError for an answer that is refused."""

    def end(self) -> None:
        """End it and all that it has started."""


W = TypeVar("W", bound=Worker)


class Backend(Protocol[W]):
    """Where workers live."""

    def start(self) -> W:
        """Start a worker."""

    def heard(self, workers: Sequence[W], seconds: float) -> Collection[W]:
        """Return the workers that have said something or have died; wait at most so long until there is one."""

    def close(self) -> None:
        """Leave nothing behind; all workers have ended."""


@dataclass
class Job:
    """A task that was submitted."""

    pool: Pool[Any]
    task: bytes
    folder: Path | None = None
    timeout: float | None = None
    """Seconds that it may take, without the start of its worker."""
    deaths: int = 0
    """How many workers have died over it."""
    answer: Answer | None = None
    refusal: str = ""
    """Why there is no answer."""

    def result(self) -> Answer:
        """Wait for the answer. Raises TrialError if the workers die over the task, or it takes too long."""
        while self.answer is None and not self.refusal:
            self.pool.step()
        if self.answer is None:
            raise TrialError(self.refusal)
        return self.answer


@dataclass(eq=False)
class _Member(Generic[W]):
    worker: W
    job: Job | None = None
    ready: bool = False
    """Whether it has built what all tasks need; it takes a task only then."""
    since: float = 0.0
    """When it got its task."""

    @property
    def until(self) -> float:
        """When its task is over its time."""
        return math.inf if self.job is None or self.job.timeout is None else self.since + self.job.timeout


@dataclass
class Pool(Generic[W]):
    """At most `workers` workers; they start with the first task, and a dead one is replaced when a task needs it."""

    backend: Backend[W]
    workers: int
    max_retries: int = 1
    """How often a task is tried again whose worker has died."""
    say: Callable[[str], None] = lambda line: None
    """Called with a line if no worker starts."""
    _alive: list[_Member[W]] = field(default_factory=list)
    _queue: deque[Job] = field(default_factory=deque)
    _waiting: float | None = None
    """Since when tasks wait for a first worker."""

    def submit(self, task: Mapping[str, Any], timeout: float | None = None) -> Job:
        """Hand a task to the first worker that is free. Its answer is waited for with `Job.result`."""
        folder = task.get("folder")
        job = Job(self, json.dumps(task).encode(), Path(folder) if folder else None, timeout)
        self._queue.append(job)
        self._assign()
        return job

    def close(self) -> None:
        """End all workers, whatever they do."""
        self._queue.clear()
        while self._alive:
            self._alive.pop().worker.end()
        self.backend.close()

    def step(self) -> None:
        """Wait until a worker has something to say, has died, or has taken too long; at most `GLANCE` seconds."""
        self._assign()
        now = time.monotonic()
        left = [member.until - now for member in self._alive]
        heard = self.backend.heard([m.worker for m in self._alive], max(min([GLANCE, *left]), 0.0))
        for member in list(self._alive):
            if member.worker in heard:
                self._hear(member)
            elif time.monotonic() >= member.until:
                self._stop(member)
        self._say_if_none_starts()

    def _assign(self) -> None:
        """Start missing workers as long as there are tasks, and hand tasks to free ones."""
        while self._queue and len(self._alive) < self.workers:
            self._alive.append(_Member(self.backend.start()))
        for member in self._alive:
            if not self._queue:
                break
            if member.job is None and member.ready:
                member.job, member.since = self._queue.popleft(), time.monotonic()
                member.worker.send(member.job.task, member.job.folder)

    def _hear(self, member: _Member[W]) -> None:
        try:
            said = member.worker.receive()
        except Died as death:
            self._buried(member, str(death))
            return
        except TrialError as refused:
            said = b""
            if member.job is not None:
                member.job.refusal, member.job = str(refused), None
        if not member.ready:
            member.ready = True
        elif member.job is not None:
            member.job.answer, member.job = json.loads(said), None
        self._assign()

    def _stop(self, member: _Member[W]) -> None:
        job = member.job
        self._alive.remove(member)
        member.worker.end()
        assert job is not None
        job.refusal = (
            f"A trial ends within executor.trial_timeout={job.timeout:g} s, but got one that was still running, so "
            "its worker was ended. Allow more time, or find what hangs."
        )

    def _buried(self, member: _Member[W], death: str) -> None:
        """Remove a worker that has died; the task that it had, or was to get, is tried again or refused."""
        self._alive.remove(member)
        member.worker.end()
        job = member.job or (self._queue.popleft() if self._queue and not member.ready else None)
        if job is None:
            return
        job.deaths += 1
        if job.deaths <= self.max_retries:
            self._queue.appendleft(job)
            return
        job.refusal = (
            f"A worker lives until its task is done, but got {death}, {job.deaths} times with the retries of "
            f"executor.max_retries={self.max_retries}."
        )

    def _say_if_none_starts(self) -> None:
        if not self._queue or any(member.ready for member in self._alive):
            self._waiting = None
        elif self._waiting is None:
            self._waiting = time.monotonic()
        elif 0.0 < self._waiting < time.monotonic() - STARTS:
            self.say(f"{'executor':<12} no worker has started for {STARTS:g} s: the machines may have no room for one")
            self._waiting = 0.0  # said
