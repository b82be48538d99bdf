"""Results on disk until the tracking store holds them: delivered in order, once, by whichever process comes to it.

    <folder>/00000017/record.json    what a run is to hold; the entry counts from the moment that this file is there
                      files/         the files of the run

Every trial ends through here. Its record is its commit point: from then on the result cannot be lost. While the store
answers, an entry is delivered at once and deleted. While it is away, entries stay, are written through to the disk, and
the study goes on: its search is in this folder, whose lock the driver holds. A study whose search other folders may
continue waits instead, because they would not see what is kept here.

A delivery may be repeated: it finds the run of a trial by its number, and a run that holds the result already is only
ended. A run that holds another result, of a start that has taken the study over, stays as it is.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from qflow.core import record
from qflow.core.errors import QflowError, StoreAwayError
from qflow.search.domain import Scalar
from qflow.search.outcome import Marker, Tracker

RECORD, FILES, ASIDE = "record.json", "files", "aside-"
LIMIT = 8 * 2**30
"""Bytes of kept results from which on the study waits for the store."""
STUDY = -1  # in place of the number of a trial: the run of the study
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Record:
    """What a run is to hold. `run_id` is empty for a trial whose run could not be made yet."""

    run_id: str
    number: int = STUDY
    label: str = ""
    marker: str = ""
    """The commit marker of a finished trial."""
    status: str = ""
    reason: str = ""
    metrics: Mapping[str, float] = field(default_factory=dict)
    """These four are of the run of the study; those of a trial are in its marker."""
    params: Mapping[str, Scalar] = field(default_factory=dict)
    tags: Mapping[str, str] = field(default_factory=dict)
    tables: tuple[str, ...] = ()


def spool_of(root: Path, study: str) -> Path:
    """Return the folder of a study's spool below the folder `root` of its search."""
    return root / "spool" / quote(study, safe="")


def waiting(folder: Path) -> list[Path]:
    """Return the entries of a spool that wait to be delivered, the oldest first."""
    return sorted(file.parent for file in folder.glob(f"[0-9]*/{RECORD}"))


@dataclass
class Spool:
    """The spool of one study; `parent` is the study's run. One process at a time, which drives the study, may use it.

    `still_owned` raises if another start has taken the study over. `made` is called with the number and the run of each
    trial whose run could not be made before. With `goes_on` a store that is away is not waited for.
    """

    folder: Path
    study: str
    tracker: Tracker
    goes_on: bool
    still_owned: Callable[[], None]
    say: Callable[[str], None] = _log.warning
    parent: str = ""
    made: Callable[[int, str], None] = lambda *_: None
    checkpoint: Callable[[str], None] = lambda _: None
    _next: int = 0
    _fresh: set[Path] = field(default_factory=set)  # kept by this process, and not tried yet
    _synced: dict[Path, int] = field(default_factory=dict)  # entry -> bytes

    def __post_init__(self) -> None:
        entries = waiting(self.folder)
        for path in self.folder.glob("[0-9]*"):
            if path not in entries:
                shutil.rmtree(path)  # of a process that was killed while it wrote or deleted the entry
        self._next = max((int(path.name) + 1 for path in entries), default=0)
        for entry in entries:
            try:
                _read(entry)
            except (QflowError, ValueError):
                self._set_aside(entry, "a kept result cannot be read")

    def trials(self) -> dict[int, Record]:
        """Return the records of trials that wait, by number."""
        found = map(_read, waiting(self.folder))
        return {each.number: each for each in found if each.number != STUDY}

    def kept(self) -> str:
        """Return in words what waits."""
        trials = len(self.trials())
        return f"{f'{trials} trials' if trials else 'values of the run of the study'} in {self.folder}"

    def start_trial(self, number: int, label: str) -> str:
        """Return the id of a new run for a trial; it is empty while the store is away."""
        if self.deliver():
            with suppress(StoreAwayError), self._patience():
                return self.tracker.start_trial(self.parent, self.study, number, label)
        return ""

    def log_study(self, run_id: str, *, folder: Path | None = None, **values: Any) -> None:
        """Add files and values (metrics, params, tags, tables) to the study's run, now or when the store is back."""
        held = Record(run_id, **values)
        if self.deliver():
            with suppress(StoreAwayError), self._patience():
                self._add(held, folder)
                return
        self.keep(held, folder, shutil.copytree)
        self._write_through()

    def commit(self, held: Record, files: Path | None = None) -> None:
        """Keep the end of a trial, whose files are moved, and deliver it if the store answers."""
        self.keep(held, files)
        self.deliver()

    def keep(self, held: Record, files: Path | None = None, bring: Callable[[Path, Path], Any] = shutil.move) -> None:
        """Write an entry, completely or not at all; its files are moved into it. Raises OSError if the disk is full."""
        entry = self.folder / f"{self._next:08d}"
        self._next += 1
        entry.mkdir(parents=True)
        if files:
            bring(files, entry / FILES)
        aside = entry / f".{RECORD}"
        aside.write_text(record.to_json(held), encoding="utf-8")
        os.replace(aside, entry / RECORD)
        self._fresh.add(entry)
        self.checkpoint("kept")

    def deliver(self, wait: bool = False) -> bool:
        """Deliver all entries in order; return whether none is left.

        While the store is away they are left, written through to the disk. It is waited for if `wait` is set, if the
        study cannot go on without it, or if as much is kept as there may be.
        """
        entries = waiting(self.folder)
        old = "" if self._fresh.issuperset(entries) else self.kept()
        try:
            with nullcontext() if wait else self._patience():
                for entry in entries:
                    self._deliver(entry)
        except StoreAwayError:
            self._write_through()
            return False
        if old:
            self.say(f"{'kept':<12} {old} are delivered")
        return True

    def close(self) -> None:
        """Deliver the trial whose delivery was interrupted; what is kept for longer is left to the next start."""
        if not self._synced:
            self.deliver()

    def require_owned(self) -> None:
        """Raise TrackingError if another start has taken the study over; while the store is away nobody can know."""
        with suppress(StoreAwayError), self._patience():
            self.still_owned()

    def set_aside(self, number: int, why: str) -> None:
        """Take the entry of a trial out of the way, and say why."""
        for entry in waiting(self.folder):
            if _read(entry).number == number:
                self._set_aside(entry, f"the result of trial {number} is not delivered, because {why}")

    def _patience(self) -> Any:
        if self.goes_on and (kept := sum(self._synced.values())) > LIMIT:
            self.say(f"{'kept':<12} {kept / 2**30:.1f} GiB in {self.folder}, the most there may be: the study waits")
            return nullcontext()
        return self.tracker.keeping(self.folder) if self.goes_on else nullcontext()

    def _deliver(self, entry: Path) -> None:
        kept, files = _read(entry), entry / FILES
        fresh = entry in self._fresh
        self._fresh.discard(entry)
        if not fresh:
            self.still_owned()
        if kept.number == STUDY:
            if kept.run_id == self.parent:
                self._add(kept, files if files.is_dir() else None)
            else:
                return self._set_aside(entry, f"the study's run is {self.parent} now, and not {kept.run_id}")
        else:
            run = kept.run_id or self._run_of(kept)
            stored = None if fresh else self.tracker.result(run)
            if stored not in (None, kept.marker):
                return self._set_aside(entry, f"run {run} of trial {kept.number} holds the result of another start")
            if kept.marker and not stored:
                self._commit(run, kept.marker, files)
            self.tracker.end(run, kept.status, kept.reason or None)
            if not kept.run_id:
                self.made(kept.number, run)
            self.checkpoint("ended")
        self._synced.pop(entry, None)
        shutil.rmtree(entry)
        return None

    def _add(self, held: Record, folder: Path | None) -> None:
        self.tracker.log_study(
            held.run_id,
            metrics=held.metrics,
            params=held.params,
            tags=held.tags,
            folder=folder,
            tables=held.tables,
        )

    def _commit(self, run: str, marker: str, files: Path) -> None:
        outcome = Marker.from_json(marker).outcome
        tables = self.tracker.upload(run, files)
        self.checkpoint("uploaded")
        self.still_owned()
        self.tracker.commit(run, marker, outcome.params, outcome.metrics, outcome.tags, None, tables)
        self.checkpoint("committed")

    def _run_of(self, kept: Record) -> str:
        """Return the run of a trial that was begun while the store was away; an earlier try may have made it."""
        found = self.tracker.find_trial(self.study, kept.number)
        return found or self.tracker.start_trial(self.parent, self.study, kept.number, kept.label)

    def _set_aside(self, entry: Path, what: str) -> None:
        place = entry.with_name(f"{ASIDE}{entry.name}-{os.getpid()}")
        entry.rename(place)
        self._synced.pop(entry, None)
        self.say(f"{'kept':<12} {what}; it stays in {place}")

    def _write_through(self) -> None:
        """Write the entries through to the disk, so that a machine that loses power keeps them."""
        for entry in waiting(self.folder):
            if entry not in self._synced:
                self._synced[entry] = sum(_sync(path) for path in [*entry.rglob("*"), entry])
                _sync(self.folder)


def _read(entry: Path) -> Record:
    return record.from_dict(Record, json.loads((entry / RECORD).read_text(encoding="utf-8")))


def _sync(path: Path) -> int:
    """Write a file or a folder through to the disk; return its size in bytes."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
        return os.fstat(number).st_size
    finally:
        os.close(number)
