"""One try at a trial: what it gave, or why it failed; and the interface of what runs tries, in this process or others.

Any exception of the user's model, data or metric fails its own trial only, with the place in the user's code, and so
does an end of the process that it asks for (SystemExit). An interrupt is no such failure.
"""

from __future__ import annotations

import logging
import os
import sysconfig
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeAlias

from qflow.core.errors import QflowError, TrialError
from qflow.core.stored_text import one_line
from qflow.search.domain import Values
from qflow.search.outcome import Marker, Outcome

Evaluate: TypeAlias = Callable[[Values, Path], Outcome]
"""Evaluates a point, writes the trial's files into the folder, and returns its numbers."""
OTHERS = ("torch", "numpy")  # libraries whose frames do not say where the user's code fails
LONGEST = 500  # characters of a foreign exception's text
_QFLOW = str(Path(__file__).parents[1]) + os.sep
_log = logging.getLogger(__name__)


class Running(Protocol):
    """A trial that an executor evaluates."""

    def result(self) -> Marker:
        """Wait for the trial's numbers and its seconds, in a marker without a label. Raises TrialError."""


class Executor(Protocol):
    """Evaluates trials. The driver alone asks, tells and logs: an executor only computes."""

    @property
    def workers(self) -> int:
        """How many trials run at once."""

    def submit(self, params: Values, folder: Path) -> Running:
        """Begin the trial at `params`, which writes its files into `folder`."""

    def close(self) -> None:
        """Stop all trials that run."""


def attempt(evaluate: Evaluate, params: Values, folder: Path, n_objectives: int) -> Marker:
    """Evaluate a point. Raises TrialError, with reason and place, whatever goes wrong."""
    start = time.monotonic()
    try:
        outcome = evaluate(params, folder)
        outcome.check(n_objectives)
    except TrialError:
        raise
    except QflowError as error:
        raise TrialError(str(error)) from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the user's code may raise SystemExit, or a class of its own
        _log.debug("a trial failed", exc_info=True)
        raise TrialError(reason_of(error)) from None
    marker = Marker(outcome, "", round(time.monotonic() - start, 3))
    marker.to_json()  # raises before anything is written if the outcome cannot be stored
    return marker


def reason_of(error: BaseException) -> str:
    """Return type and text of an exception in one line, and the innermost place in the user's code that it passed."""
    text = one_line(str(error), LONGEST)
    shown = f"{type(error).__name__}: {text}" if text else type(error).__name__
    frames = traceback.extract_tb(error.__traceback__)
    places = [f for f in frames if not f.filename.startswith("<")]
    own = [f for f in places if _is_users(f.filename)] or places
    return f"{shown} ({own[-1].filename}:{own[-1].lineno})" if own else shown


def _is_users(file: str) -> bool:
    paths = sysconfig.get_paths()
    packages = {paths["purelib"], paths["platlib"]}
    if package := next((folder for folder in packages if file.startswith(folder + os.sep)), ""):
        return file[len(package) + 1 :].split(os.sep)[0] not in OTHERS and not file.startswith(_QFLOW)
    return not file.startswith((_QFLOW, paths["stdlib"] + os.sep))


@dataclass(frozen=True)
class _Here:
    evaluate: Evaluate
    params: Values
    folder: Path
    n_objectives: int

    def result(self) -> Marker:
        return attempt(self.evaluate, self.params, self.folder, self.n_objectives)


@dataclass(frozen=True)
class Serial:
    """Evaluates one trial after another in this process."""

    evaluate: Evaluate
    n_objectives: int
    workers: int = 1

    def submit(self, params: Values, folder: Path) -> Running:
        """Return the trial; it is evaluated when its result is asked for."""
        return _Here(self.evaluate, params, folder, self.n_objectives)

    def close(self) -> None:
        """Nothing runs after a result."""
