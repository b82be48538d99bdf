"""The cache of a study: calibration statistics, tables and evaluations, stored by content for trials and later starts.

A key is the digest of everything that the content depends on: weights, data, the code of model, metric and qflow,
versions, threads and the settings concerned (tasks/identity.py). A later trial, a later start or another study in the
same root finds what was computed before. If something changes, so does the key, and no entry has to be invalidated. A
hit equals, bit for bit, what would have been computed.

A file is one record in safetensors: tensors as tensors, everything else as JSON in its header, so that nothing is
unpickled. It is written to disk under a temporary name and renamed, so that a kill leaves no partial file. Its header
has a checksum over its kind, its key and its content: a file that was changed, or that lies under the name of another,
is said and computed again. Files may be deleted at any time.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from qflow.core.errors import QflowError
from qflow.core.record import digest, from_dict, plain
from qflow.core.store import written_aside

T = TypeVar("T")
_log = logging.getLogger(__name__)


@dataclass
class Cache:
    """Records by kind and key, in memory and, with a `folder`, on disk."""

    folder: Path | None = None
    context: dict[str, Any] = field(default_factory=dict)
    """What all entries depend on; empty for a cache in memory, which serves one task of one process."""
    say: Callable[[str], None] = _log.warning
    """Called with one line for each entry that is not stored or cannot be read."""
    hits: Counter[str] = field(default_factory=Counter)
    misses: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self._held: dict[tuple[str, str], Any] = {}

    def leave_disk(self, unidentified: str) -> None:
        """Keep entries in memory only from now on, because `unidentified` may differ at the next start unnoticed."""
        if self.folder is not None:
            self.say(f"{'cache':<12} in memory only: {unidentified} cannot be recognised at the next start")
        self.folder = None

    def get(self, kind: str, key: Any, compute: Callable[[], T], record: type[T]) -> T:
        """Return the content of `key`, which is a `record`; compute and store it if it is missing."""
        found = self.known(kind, key, record)
        return self.keep(kind, key, compute()) if found is None else found

    def known(self, kind: str, key: Any, record: type[T]) -> T | None:
        """Return the content of `key` and count a hit, or return None if it is missing."""
        name, place = self._place(kind, key)
        found: T | None = self._held.get((kind, name))
        if found is None and place is not None:
            found = self._read(place, record)
        if found is not None:
            self.hits[kind] += 1
            self._held[kind, name] = found
        return found

    def keep(self, kind: str, key: Any, content: T) -> T:
        """Store the computed content of `key` and count a miss."""
        name, place = self._place(kind, key)
        self.misses[kind] += 1
        if place is not None:
            self._write(place, content)
        self._held[kind, name] = content
        return content

    def files(self) -> dict[str, Path]:
        """Return the files of what this process has stored or read, by their names below the folder."""
        held = {f"{kind}/{name}.safetensors" for kind, name in self._held} if self.folder else set()
        return {name: self.folder / name for name in sorted(held) if self.folder and (self.folder / name).is_file()}

    def _place(self, kind: str, key: Any) -> tuple[str, Path | None]:
        name = digest({"context": self.context, "key": key})
        return name, self.folder / kind / f"{name}.safetensors" if self.folder else None

    def __str__(self) -> str:
        kinds = sorted({*self.hits, *self.misses})
        return ", ".join(f"{kind} {self.hits[kind]} of {self.hits[kind] + self.misses[kind]}" for kind in kinds)

    def _read(self, place: Path, record: type[T]) -> T | None:
        """Return the content of a file; None if it is missing or cannot be read, so that it is computed again."""
        if not os.path.lexists(place):
            return None
        try:
            return read_record(place, record)
        except Exception as error:  # a file that is damaged or not ours may raise anything
            text = " ".join(str(error).split())
            self.say(f"{'cache':<12} {place} cannot be read and is computed again: {type(error).__name__}: {text}")
            return None

    def _write(self, place: Path, content: Any) -> None:
        try:
            write_record(place, content)
        except (QflowError, OSError, SafetensorError) as error:  # a NaN has no JSON; a disk may be full
            self.say(f"{'cache':<12} {place.parent.name} is kept in memory only: {' '.join(str(error).split())}")


def read_record(place: Path, record: type[T]) -> T:
    """Return the record that `write_record` wrote to this place. Another file may raise any exception."""
    text, tensors = _content(place)

    def with_tensor(node: dict[str, Any]) -> Any:
        name = node.get("tensor")
        return tensors[name] if len(node) == 1 and isinstance(name, str) else node

    return from_dict(record, json.loads(text, object_hook=with_tensor))


def _content(place: Path) -> tuple[str, dict[str, Tensor]]:
    """Return JSON and tensors of a file, whose checksum holds."""
    if place.is_symlink() or not place.is_file():
        raise ValueError("it is no file of its own")
    with safe_open(place, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a mapping
        header = file.metadata() or {}
    if header["checksum"] != _checksum(place, header["record"], tensors):
        raise ValueError("its checksum is another: it was changed, or belongs to another key")
    return header["record"], tensors


def damaged(files: Iterable[Path]) -> Iterator[tuple[Path, str]]:
    """Yield each file of a cache that cannot be read or has another checksum, with the reason."""
    for place in files:
        try:
            _content(place)
        except Exception as error:  # a file that is damaged or not ours may raise anything
            yield place, " ".join(f"{type(error).__name__}: {error}".split())


def write_record(place: Path, content: Any) -> None:
    """Write a record whose values may be tensors, completely or not at all. Raises QflowError for NaN."""
    tensors: dict[str, Tensor] = {}
    text = json.dumps(plain(_lifted(content, tensors), "record"), allow_nan=False)  # keys keep their order
    with written_aside(place) as aside:
        save_file(tensors, aside, {"record": text, "checksum": _checksum(place, text, tensors)})
        with aside.open("rb") as file:
            os.fsync(file.fileno())  # else a renamed file may be empty after a power failure


def _checksum(place: Path, text: str, tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 over kind and key (the last two parts of `place`), the JSON and all tensors."""
    found = hashlib.sha256(f"{place.parent.name}/{place.stem}\n{text}".encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"\n{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def _lifted(value: Any, tensors: dict[str, Tensor]) -> Any:
    """Return `value` with each tensor moved to `tensors` and replaced by its name."""
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
