"""What trials and starts share, kept by content: statistics, tables, evaluated qconfigs.

A key is the digest of everything that the content depends on: weights, data, the metric's code, versions, threads
and the settings concerned. So what was computed once is found again by the next trial, the next start and another
study in the same root; and what no longer fits is not found, without anybody invalidating it. A hit is what a miss
would have computed, bit by bit: JSON keeps floats exactly, tensors are stored as they are.

Files are written aside and renamed, so that a kill leaves none half written; they may be deleted at any time.
"""

from __future__ import annotations

import json
import os
import pickle
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from qflow.core.errors import QflowError
from qflow.core.record import digest, from_dict, to_json

T = TypeVar("T")


@dataclass
class Cache:
    """Contents by kind and key, in memory and, with a `folder`, on disk."""

    folder: Path | None = None
    context: dict[str, Any] = field(default_factory=dict)
    """What every content depends on."""
    hits: Counter[str] = field(default_factory=Counter)
    misses: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._held: dict[tuple[str, str], Any] = {}

    def get(self, kind: str, key: Any, compute: Callable[[], T], record: type[T] | None = None) -> T:
        """The content of `key`, computed where it is not known.

        A `record` class is kept as JSON, anything else as a pickle (the folder is the user's own, like the code).
        """
        name = digest({"context": self.context, "key": key})
        if (kind, name) in self._held:
            self.hits[kind] += 1
            return self._held[kind, name]  # type: ignore[no-any-return]
        place = self.folder / kind / f"{name}.{'json' if record else 'pkl'}" if self.folder else None
        found = _read(place, record) if place is not None else None
        if found is None:
            self.misses[kind] += 1
            found = compute()
            if place is not None:
                _write(place, found, record)
        else:
            self.hits[kind] += 1
        self._held[kind, name] = found
        return found

    def __str__(self) -> str:
        kinds = sorted({*self.hits, *self.misses})
        return ", ".join(f"{kind} {self.hits[kind]} of {self.hits[kind] + self.misses[kind]}" for kind in kinds)


def _read(place: Path, record: type[T] | None) -> T | None:
    """The content of a file; None where there is none, or one that cannot be read (it is computed again)."""
    try:
        if record is None:
            return pickle.loads(place.read_bytes())  # type: ignore[no-any-return]
        return from_dict(record, json.loads(place.read_text()))
    except FileNotFoundError:
        return None
    except Exception:  # a file that is damaged or of other classes may raise anything; computing it again replaces it
        return None


def _write(place: Path, content: Any, record: type | None) -> None:
    try:
        data = to_json(content).encode() if record else pickle.dumps(content)
    except QflowError:  # a NaN has no JSON: kept in memory only
        return
    place.parent.mkdir(parents=True, exist_ok=True)
    aside = place.with_suffix(f".{os.getpid()}.tmp")
    aside.write_bytes(data)
    os.replace(aside, place)
