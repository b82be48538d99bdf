"""`--json`: stdout is one JSON document, for scripts; everything that is printed goes to stderr.

The document holds `schema` (raised when the meaning of a field changes), `command`, `exit_code` with its `meaning`,
`error` (the line of a mistake, else null) and `result` (the fields of the command, in docs/commands.md). Infinity is
the string "inf", and a number that is not known or not a number is null.
"""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from qflow.core.record import plain, to_json

SCHEMA = 1


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


def document(name: str, code: int, meaning: str, record: Mapping[str, Any], error: str) -> str:
    """Return the document of a command that ended."""
    found = {
        "schema": SCHEMA,
        "command": name,
        "exit_code": code,
        "meaning": meaning,
        "error": error or None,
        "result": _known(record),
    }
    return to_json(found, indent=1) + "\n"


def _known(value: Any) -> Any:
    """Return the value with null for NaN, which JSON does not have."""
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _known(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_known(item) for item in value]
    return plain(value)
