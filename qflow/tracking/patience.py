"""Patience with a tracking store that goes away: each call of MLflow is repeated until the store answers again.

MLflow repeats a failed request by itself, without a word and for up to 740 s. Its own repetitions are switched off, and
a call is repeated here instead: one line says at once that the store is away, another that it is back, and after
`seconds` the call raises a TrackingError. Only errors that say that nobody answers are repeated; a refusal is not.

A store may hang: it takes a call and never answers. This is said after a few seconds, and the call is ended in time
(answer.py), at the latest when the patience is over.

A caller that keeps its results elsewhere meanwhile does not wait (`keeping`): its calls raise a StoreAwayError at once,
and the store is looked for every few seconds only, so that what the caller computes is hardly held up.

Every call may have reached the store before its answer was lost. Most have the same effect twice. What creates
something looks first whether the lost call has created it already.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

from qflow.core.credentials import masked
from qflow.core.errors import StoreAwayError, TrackingError
from qflow.tracking.answer import FILES_TIMEOUT, TIMEOUT, bounded

T = TypeVar("T")
DEFAULT = 600.0
"""Seconds: a server is restarted, moved or upgraded in minutes, and what needs longer needs somebody to look at it."""
FIRST, LONGEST = 0.2, 5.0  # seconds between two tries; each pause is twice the one before
HUNG = 1.0  # seconds; if a call takes longer and is interrupted, its store counts as away
LOOK = 1  # seconds that a server has for an answer while it is known to be away, or an interrupted command ends
_DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    TIMEOUT: "30",  # 120 s by default; a server that hangs, or whose host has gone, is noticed no sooner
    FILES_TIMEOUT: "120",  # a server passes a large file on before it answers
}
_GONE = {429, 502, 503, 504}  # HTTP: too many requests, bad gateway, unavailable, gateway timeout
_NETWORK = {  # classes of requests, urllib3, http.client and botocore, which have no common base
    "ConnectionError", "ConnectTimeout", "ReadTimeout", "ProxyError", "ChunkedEncodingError", "NewConnectionError",
    "NameResolutionError", "ProtocolError", "RemoteDisconnected", "IncompleteRead", "MaxRetryError",
    "ReadTimeoutError", "ConnectTimeoutError", "EndpointConnectionError", "ConnectionClosedError",
}  # fmt: skip


def leave_repeating_to_us() -> None:
    """Switch off MLflow's own repetitions, where the user has not set them; MLflow reads these at every call."""
    for name, value in _DEFAULTS.items():
        os.environ.setdefault(name, value)


class Patience:
    """How long calls wait for a store that is away, and where this is said."""

    def __init__(self, seconds: float = DEFAULT, say: Callable[[str], None] | None = None) -> None:
        self.seconds = seconds
        self.say = say or _to_stderr
        self.why = ""
        """Why a study waits instead of going on; it is said too."""
        self._kept_in: Path | None = None
        self._since: float | None = None  # when the store went away
        self._said: set[Path | None] = set()  # where results are kept, or None for a wait, once the user knows
        self._next_look = 0.0
        self._given_up = ""

    @contextmanager
    def keeping(self, place: Path) -> Iterator[None]:
        """Let calls inside raise a StoreAwayError instead of waiting; the caller keeps its results in `place`."""
        before, self._kept_in = self._kept_in, place
        try:
            yield
        finally:
            self._kept_in = before

    def call(self, uri: str, function: Callable[[], T], made: Callable[[], T | None] | None = None) -> T:
        """Return `function()`, repeated while the store is away; before a repetition `made` looks for its result.

        Raises TrackingError `seconds` after the store went away. From then on no call waits, nor does one while the
        command is being interrupted: what stays open is mended by the next start. Raises StoreAwayError inside
        `keeping`.
        """
        if threading.current_thread() is not threading.main_thread():
            return function()  # a heartbeat, say: what comes next repeats it, and the study does not wait for it
        if self._given_up:
            raise TrackingError(self._given_up)
        if self._kept_in and self._said and time.monotonic() < self._next_look:
            raise StoreAwayError("The store was away a moment ago.")
        start, look = time.monotonic(), False
        try:
            for tried in count():
                try:
                    with self._bounded(uri, start):
                        found = made() if look and made else None
                        look = True
                        result = function() if found is None else found
                    break
                except Exception as error:
                    if not is_away(error):
                        self._back()
                        raise
                    self._note(uri, error, start, tried)
                waited = time.monotonic() - (self._since or start)
                time.sleep(min(FIRST * 2**tried, LONGEST, max(self.seconds - waited, 0.0)))
        except KeyboardInterrupt:
            if self._said or time.monotonic() - start > HUNG:
                self._given_up = self._sentence(uri, "an interrupted call")
            raise
        self._back()
        return result

    def _back(self) -> None:
        """Say that the store is back, if the user knows that it was away."""
        if self._said and self._since is not None:
            self.say(f"{'tracking':<12} the store is back after {time.monotonic() - self._since:.0f} s")
        self._since, self._said = None, set()

    def _note(self, uri: str, error: Exception, start: float, tried: int) -> None:
        """Say once that the store is away. Raises TrackingError if it is given up, StoreAwayError inside `keeping`."""
        now = time.monotonic()
        self._since = self._since or start
        waited = now - self._since
        if waited >= self.seconds or _interrupted():
            self._given_up = self._sentence(uri, f"'{_words(error)}' for {waited:.0f} s")
            raise TrackingError(self._given_up) from error
        if not self._said and not tried and now - start < LONGEST:
            return  # a connection that was merely old is new at the second try
        self._say_away(uri, waited, _words(error))
        if self._kept_in:
            self._next_look = min(now + LONGEST, self._since + self.seconds)
            raise StoreAwayError(str(error)) from error

    def _bounded(self, uri: str, start: float) -> AbstractContextManager[None]:
        """Bound the time for an answer to a call inside, which was made first at `start`, and say it if none comes."""
        left = max(self.seconds - (time.monotonic() - (self._since or start)), LOOK)
        looking = _interrupted() or bool(self._kept_in and self._said)

        def slow(seconds: float) -> None:
            self._since = self._since or time.monotonic() - seconds
            self._say_away(uri, time.monotonic() - self._since, "no answer yet")

        return bounded(LOOK if looking else left, slow, _interrupted)

    def _say_away(self, uri: str, waited: float, why: str) -> None:
        """Say that the store is away, unless the user knows it and what happens meanwhile."""
        if self._kept_in in self._said:
            return
        self._said.add(self._kept_in)
        self.say(
            f"{'tracking':<12} the store {masked(uri)} is away since {waited:.0f} s ({why}); {self._meanwhile()}. "
            "Ctrl-C ends the command, and the same command continues."
        )

    def _meanwhile(self) -> str:
        if self._kept_in:
            return f"the study goes on for up to {self.seconds:.0f} s, and its results are kept in {self._kept_in}"
        return f"waiting up to {self.seconds:.0f} s for it{f', because {self.why}' if self.why else ''}"

    def _sentence(self, uri: str, got: str) -> str:
        kept = f" in {self._kept_in} until then" if self._kept_in else ""
        return (
            f"The tracking store must answer, but got {got} from {masked(uri)}. Start it and run the same command "
            f"again: finished trials are kept{kept}."
        )


class Patient:
    """A client of MLflow, or a place of artifacts, whose calls have patience."""

    def __init__(self, target: Any, uri: str, patience: Patience) -> None:
        self._target, self._uri, self._patience = target, uri, patience

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._target, name)
        return partial(self._with_patience, found) if callable(found) else found

    def _with_patience(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        return self._patience.call(self._uri, lambda: function(*args, **kwargs))

    def create_run(self, experiment_id: str, **terms: Any) -> Any:
        """Create a run once: one of the same name and start is taken for it, after an answer was lost."""
        terms["start_time"] = terms.get("start_time") or int(time.time() * 1000)

        def made() -> Any:
            runs = self._target.search_runs([experiment_id], f"attributes.start_time = {terms['start_time']}")
            return next((run for run in runs if run.info.run_name == terms["run_name"]), None)

        return self._patience.call(self._uri, lambda: self._target.create_run(experiment_id, **terms), made)

    def create_model_version(self, name: str, source: str, **terms: Any) -> Any:
        """Create a version once: one with the same source is taken for it, after an answer was lost."""

        def made() -> Any:
            versions = self._target.search_model_versions("name = '{}'".format(name.replace("'", "''")))
            return next((version for version in versions if version.source == source), None)

        create = partial(self._target.create_model_version, name, source=source, **terms)
        return self._patience.call(self._uri, create, made)


def is_away(error: BaseException) -> bool:
    """Return whether an error says that nobody answers: neither a refusal, nor a defect, nor a full disk."""
    chain = list(_causes(error))
    if any("SSLError" in type(cause).__name__ or "SSLCertVerificationError" in str(cause) for cause in chain):
        return False  # a certificate does not mend itself
    return any(map(_says_away, chain))


def _says_away(cause: BaseException) -> bool:
    name, home = type(cause).__name__, type(cause).__module__.partition(".")[0]
    if home == "sqlalchemy":
        return name in ("OperationalError", "InterfaceError") and _dropped(cause)
    if home == "mlflow":
        if name == "RestException":  # in others MLflow's code stands for a database's error, which is in the chain
            return getattr(cause, "get_http_status_code", int)() in _GONE
        return any(f"failed with error code {code}" in str(cause) for code in _GONE)
    status: int = getattr(getattr(cause, "response", None), "status_code", 0)
    return status in _GONE or (name in _NETWORK and not status) or isinstance(cause, (ConnectionError, TimeoutError))


def _dropped(error: Any) -> bool:
    """Return whether an error of a database says that there is no connection, or that another process holds it."""
    origin = error.orig
    if type(origin).__module__.startswith("sqlite3"):
        return "database is locked" in str(origin)
    state = getattr(origin, "sqlstate", None) or getattr(origin, "pgcode", None)
    if state:
        return bool(
            state[:2] == "08" or state[:3] == "57P" or state == "53300"
        )  # connection, shutdown, too many of them
    refused = ("authentication failed", "does not exist", "no pg_hba.conf entry", "Access denied")
    return bool(error.connection_invalidated) or not any(words in str(origin) for words in refused)


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__


def _interrupted() -> bool:
    """Return whether Ctrl-C or SIGTERM is being handled: the exception handler that we are called from knows."""
    handled = sys.exc_info()[1]
    return any(isinstance(cause, (KeyboardInterrupt, SystemExit)) for cause in _causes(handled))


def _words(error: Exception) -> str:
    """Return what is wrong in a few words: the innermost cause, which is the one that names it."""
    inner = [cause for cause in _causes(error) if _says_away(cause)][-1]
    return masked(" ".join(str(inner).split()))[:120] or type(inner).__name__


def _to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
