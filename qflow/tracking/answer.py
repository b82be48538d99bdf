"""The time that a store has for an answer, because a server may hang: it takes a call and never answers.

An HTTP request has a timeout, which MLflow reads at every call. A call to a database has none: its driver waits in a
loop that only a signal ends. So a timer looks four times a second what the main thread waits for.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from qflow.core.installed import DRIVERS
from qflow.process.hanging import TICK, watched

TIMEOUT, FILES_TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT", "MLFLOW_ARTIFACT_UPLOAD_DOWNLOAD_TIMEOUT"
"""MLflow's names for the timeout of a request, and of one that carries a file."""
DATABASE = 30.0  # seconds that a database has for an answer at most
SLOW = 5.0  # seconds without an answer after which that is said
_WAITING = {*DRIVERS, "socket", "ssl", "selectors", "urllib3"}
"""Packages in which a thread waits for the network."""
_REQUESTS = {("http.client", "getresponse"), ("urllib3.util.connection", "create_connection")}
"""Functions that wait for the first byte of an answer; a large file may take its time after that, and before."""


class _Unanswered(BaseException):
    """A database has not answered in time.

    It is no Exception, like KeyboardInterrupt, so that SQLAlchemy drops the connection: an answer may still come on it.
    """


@contextmanager
def bounded(seconds: float, slow: Callable[[float], None], interrupted: Callable[[], bool]) -> Iterator[None]:
    """Let the store answer a call inside within `seconds`, or sooner where it has less. Raises TimeoutError.

    `slow` gets the seconds without an answer once they are `SLOW`. `interrupted` tells whether Ctrl-C was pressed: a
    wait for a database ends with it.
    """
    ending, quiet, gave_up = interrupted(), 0.0, False
    files = seconds if ending else max(seconds, SLOW)

    def look(frame: FrameType | None) -> None:
        nonlocal quiet, gave_up
        place = _waits_for(frame)
        quiet = quiet + TICK if place else 0.0
        if quiet >= SLOW and not ending:
            slow(quiet)
        if place == "database":
            if interrupted() and not ending:
                raise KeyboardInterrupt  # psycopg asks the server to cancel its work, and waits for an answer to that
            if quiet >= min(seconds, DATABASE):
                gave_up = True
                raise _Unanswered

    try:
        with _at_most(TIMEOUT, seconds), _at_most(FILES_TIMEOUT, files), watched(look):
            yield
    except BaseException as error:  # a driver may raise another one when it finds its connection in use
        if gave_up and not isinstance(error, KeyboardInterrupt):
            raise TimeoutError("no answer") from error
        raise


def _waits_for(frame: FrameType | None) -> str:
    """Return what the main thread waits for: an answer of a `database` or of a `server`, or nothing where it works."""
    if frame is not None and _module(frame) == "threading":  # MLflow's threads transfer files
        main = threading.main_thread().ident
        others = [other for thread, other in sys._current_frames().items() if thread != main]
        return "server" if any(_waits(other) == "server" for other in others) else ""
    return _waits(frame)


def _waits(frame: FrameType | None) -> str:
    if frame is None or _module(frame).partition(".")[0] not in _WAITING:
        return ""
    while frame is not None:
        if _module(frame).startswith("sqlalchemy."):
            return "database"
        if (_module(frame), frame.f_code.co_name) in _REQUESTS:
            return "server"
        frame = frame.f_back
    return ""


def _module(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", ""))


@contextmanager
def _at_most(name: str, seconds: float) -> Iterator[None]:
    """Shorten a timeout of MLflow, which is a whole number of seconds."""
    before = os.environ.get(name, "")
    if not before.isdecimal() or int(before) <= seconds:
        yield
        return
    os.environ[name] = str(max(int(seconds), 1))
    try:
        yield
    finally:
        os.environ[name] = before
