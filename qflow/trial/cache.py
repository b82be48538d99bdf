"""What trials and starts share, kept by content: statistics, tables, evaluated qconfigs.

A key is the digest of everything that the content depends on: weights, data, the code of model, metric and qflow,
versions, threads and the settings concerned (tasks/identity.py). So what was computed once is found again by the next
trial, the next start and another study in the same root; and what no longer fits is not found, without anybody
invalidating it. A hit is what a miss would have computed, bit by bit.

A file is one record in safetensors: tensors as tensors, all else as JSON in its header, so nothing is unpickled. It is
written aside and renamed, so that a kill leaves none half written, and may be deleted at any time.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qflow.core.errors import QflowError
from qflow.core.record import digest, from_dict, plain

T = TypeVar("T")
_log = logging.getLogger(__name__)


@dataclass
class Cache:
    """Records by kind and key, in memory and, with a `folder`, on disk."""

    folder: Path | None = None
    context: dict[str, Any] = field(default_factory=dict)
    """What every content depends on; in memory alone that is one process's one task."""
    say: Callable[[str], None] = _log.warning
    """Told in one line what is not kept, or could not be read."""
    hits: Counter[str] = field(default_factory=Counter)
    misses: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._held: dict[tuple[str, str], Any] = {}

    def leave_disk(self, unidentified: str) -> None:
        """Keep everything in memory only from here on: what cannot be identified may be another next time."""
        if self.folder is not None:
            self.say(f"{'cache':<12} in memory only: nothing tells {unidentified} of this start from the next one's")
        self.folder = None

    def get(self, kind: str, key: Any, compute: Callable[[], T], record: type[T]) -> T:
        """The content of `key`, a `record`, computed where it is not known."""
        found = self.known(kind, key, record)
        return self.keep(kind, key, compute()) if found is None else found

    def known(self, kind: str, key: Any, record: type[T]) -> T | None:
        """The content of `key`, if it is known: a hit."""
        name, place = self._place(kind, key)
        found: T | None = self._held.get((kind, name))
        if found is None and place is not None:
            found = self._read(place, record)
        if found is not None:
            self.hits[kind] += 1
            self._held[kind, name] = found
        return found

    def keep(self, kind: str, key: Any, content: T) -> T:
        """Keep what had to be computed: a miss."""
        name, place = self._place(kind, key)
        self.misses[kind] += 1
        if place is not None:
            self._write(place, content)
        self._held[kind, name] = content
        return content

    def _place(self, kind: str, key: Any) -> tuple[str, Path | None]:
        name = digest({"context": self.context, "key": key})
        return name, self.folder / kind / f"{name}.safetensors" if self.folder else None

    def __str__(self) -> str:
        kinds = sorted({*self.hits, *self.misses})
        return ", ".join(f"{kind} {self.hits[kind]} of {self.hits[kind] + self.misses[kind]}" for kind in kinds)

    def _read(self, place: Path, record: type[T]) -> T | None:
        """The content of a file; None where there is none, or one that cannot be read (it is computed again)."""
        if not place.exists():
            return None
        try:
            return read_record(place, record)
        except Exception as error:  # a file that is damaged or of another make may raise anything
            text = " ".join(str(error).split())
            self.say(f"{'cache':<12} {place} cannot be read and is computed again: {type(error).__name__}: {text}")
            return None

    def _write(self, place: Path, content: Any) -> None:
        try:
            write_record(place, content)
        except (QflowError, OSError, SafetensorError) as error:  # a NaN has no JSON; a disk may be full
            self.say(f"{'cache':<12} {place.parent.name} is kept in memory only: {' '.join(str(error).split())}")


def read_record(place: Path, record: type[T]) -> T:
    """The record that `write_record` was given. Raises whatever a file that is none of its kind leads to."""
    with safe_open(place, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
        header = file.metadata() or {}

    def with_tensor(node: dict[str, Any]) -> Any:
        name = node.get("tensor")
        return tensors[name] if len(node) == 1 and isinstance(name, str) else node

    return from_dict(record, json.loads(header["record"], object_hook=with_tensor))


def write_record(place: Path, content: Any) -> None:
    """Write a record with tensors among its values, whole or not at all. Raises QflowError for NaN."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(plain(_lifted(content, tensors), "record"), allow_nan=False)  # mappings keep their order
    place.parent.mkdir(parents=True, exist_ok=True)
    aside = place.with_suffix(f".{os.getpid()}.tmp")
    try:
        save_file(tensors, aside, {"record": text})
        os.replace(aside, place)
    finally:
        aside.unlink(missing_ok=True)


def _lifted(value: Any, tensors: dict[str, Tensor]) -> Any:
    """`value` with each tensor moved to `tensors` and its name left in its place."""
    if isinstance(value, Tensor):
        name = str(len(tensors))
        tensors[name] = value.detach().to("cpu", copy=True).contiguous()  # tensors that share memory are refused
        return {"tensor": name}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _lifted(getattr(value, f.name), tensors) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: _lifted(item, tensors) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_lifted(item, tensors) for item in value]
    return value
