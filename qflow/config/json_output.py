"""`--json`: stdout is one JSON document, for programs; everything that is printed goes to stderr.

The document holds `schema` (`qflow.<command>/<number>`; another number if the meaning of a field changes), `command`,
`exit_code` with its `meaning`, `error` (null, or the line of a mistake and its parts) and `result` (results.py). Keys
are sorted. JSON has neither infinity nor NaN: such a number is null, and `not_finite` holds its place and what it was.
"""

from __future__ import annotations

import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, is_dataclass
from typing import Any, TypedDict

from qflow.core.record import plain, to_json

VERSION = 2
PARTS = re.compile(
    r"(?P<rule>.*?), but got:? (?P<got>(?:'[^']*'|\"[^\"]*\"|.)*?)(?:\.(?:\s+(?P<way_out>.*))?)?$",
    re.DOTALL,
)
"""A line `<rule>, but got <value>. <way out>.`; a full stop inside quotes ends no value."""


class ErrorFields(TypedDict):
    """Why a command did not do its work."""

    type: str
    """Name of the exception: ConfigError for what was asked, TrackingError for the store, Interrupted, ..."""
    line: str
    """The whole line, as the console prints it."""
    rule: str | None
    """What must hold; null where the line has another form, as with the next two."""
    got: str | None
    """The value that broke the rule."""
    way_out: str | None
    """What to do; null where the rule says it."""


class Document(TypedDict):
    """What a command writes to stdout with `--json`."""

    schema: str
    """qflow.<command>/<number>: the number is another one if the meaning of a field changes."""
    command: str
    """The command."""
    exit_code: int
    """0 done, 1 not (a missed goal, a difference, a refusal with reasons), 2 a mistake, 3 a defect, 130 interrupted."""
    meaning: str
    """What the exit code says for this command."""
    error: ErrorFields | None
    """null where the exit code is 0 or 1."""
    result: dict[str, Any]
    """The fields of the command. Where there is an error it is empty, or holds what is known by then."""
    not_finite: dict[str, str]
    """JSON pointer of a number that is null because it is not finite -> inf, -inf or nan."""


@dataclass(frozen=True)
class Problem:
    """What ended a command: the name of the exception and its line."""

    type: str
    line: str

    def fields(self) -> ErrorFields:
        """Return the parts of the line: the rule, the value that broke it, and the way out."""
        found = PARTS.match(self.line)
        rule, got, way_out = found.group("rule", "got", "way_out") if found else (None, None, None)
        return {"type": self.type, "line": self.line, "rule": rule, "got": got, "way_out": way_out or None}


@contextmanager
def only_json(wanted: bool) -> Iterator[Callable[[str], object]]:
    """Give the function that writes to stdout; if `wanted`, whatever else is printed inside goes to stderr.

    The file descriptor itself is redirected, so that the user's code and libraries cannot write into the document.
    """
    if not wanted:
        yield sys.stdout.write
        return
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with os.fdopen(kept, "w", encoding="utf-8", closefd=False) as stream:
            yield stream.write
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


@contextmanager
def known_so_far(record: Callable[[], Mapping[str, Any]]) -> Iterator[None]:
    """If what is inside is interrupted or refused, the document's `result` is what `record` returns then."""
    try:
        yield
    except BaseException as error:
        error.qflow_result = record()  # type: ignore[attr-defined]
        raise


def so_far(error: BaseException) -> Mapping[str, Any]:
    """Return the result that `known_so_far` has kept with an exception."""
    known = [getattr(e, "qflow_result", None) for e in (error, error.__cause__)]
    return next((found for found in known if found is not None), {})


def document(name: str, code: int, meaning: str, record: Mapping[str, Any], problem: Problem | None) -> str:
    """Return the document of a command that ended."""
    lost: dict[str, str] = {}
    found: Document = {
        "schema": f"qflow.{name}/{VERSION}",
        "command": name,
        "exit_code": code,
        "meaning": meaning,
        "error": problem.fields() if problem else None,
        "result": _finite(record, "/result", lost),
        "not_finite": lost,
    }
    return to_json(found, indent=1) + "\n"


def _finite(value: Any, where: str, lost: dict[str, str]) -> Any:
    """Return the value as builtins, with null for what is not finite; `lost` gets the place of each such number."""
    if isinstance(value, float) and not math.isfinite(value):
        lost[where] = str(float(value))
        return None
    if is_dataclass(value) and not isinstance(value, type):
        value = {name: getattr(value, name) for name in value.__dataclass_fields__}
    if isinstance(value, Mapping):
        return {str(key): _finite(item, f"{where}/{_escaped(str(key))}", lost) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item, f"{where}/{i}", lost) for i, item in enumerate(value)]
    return plain(value)


def _escaped(key: str) -> str:
    return key.replace("~", "~0").replace("/", "~1")
