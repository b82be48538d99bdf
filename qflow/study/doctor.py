"""The invariants of a store and a folder, each looked at by itself, and what can be mended without losing a result."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from qflow.core.errors import QflowError, TrackingError
from qflow.core.store import exclusive
from qflow.process.running import is_running
from qflow.search.carried import study_names
from qflow.search.reconcile import check_invariants
from qflow.search.study import Study
from qflow.tracking.artifacts import Store
from qflow.tracking.lease import LEASE, claims_of, owned
from qflow.tracking.mlflow_tracker import MlflowTracker
from qflow.tracking.registry import versions
from qflow.trial.cache import damaged

LEFT = 3600.0  # seconds after which a temporary file belongs to no process that still writes it
OTHERS = ("training", "searches")  # folders in cache/ whose files have another form, and are checked by their readers
AGAIN = " Start its qflow.tune once more: it ends what is open."


@dataclass
class Finding:
    """What was looked at in one line, what is wrong with it, and what was mended."""

    about: str
    told: str = ""
    wrong: list[str] = field(default_factory=list)
    mended: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Doctor:
    """Looks at everything in the store and in the folder `root`; `storage` holds the searches."""

    store: Store
    root: Path
    storage: str | Path
    fix: bool = False

    def findings(self) -> list[Finding]:
        """Return one finding for each invariant. Raises TrackingError if a store does not answer."""
        studies = self.store.all_studies()
        return [
            self._agreement(studies),
            self._runs(studies),
            self._leases(studies),
            self._cache(),
            self._left_over(),
            self._registry(),
        ]

    def _agreement(self, studies: dict[str, tuple[str, str]]) -> Finding:
        known, found = study_names(self.storage), Finding("studies")
        here = {name: place for run, (name, place) in studies.items() if name in known and not self._living(run)}
        for name, experiment in here.items():
            tracker = MlflowTracker(self.store.client, self.store.uri, experiment)
            problems = check_invariants(Study.read(self.storage, name), tracker)
            found.wrong += [f"{name}: {text}{AGAIN if 'running' in text.lower() else ''}" for text in problems]
        number = f"{len(here)} studies of this folder agree with their runs"
        found.told = number if len(here) != 1 else "the study of this folder agrees with its runs"
        if found.wrong:
            found.told = f"of {len(here)} studies some do not agree with their runs"
        return found

    def _runs(self, studies: dict[str, tuple[str, str]]) -> Finding:
        """Find runs that are RUNNING in studies that nobody drives; mending them ends them, committed ones as such."""
        found = Finding("runs", "no run is RUNNING without a process")
        for run, (name, experiment) in studies.items():
            tracker = MlflowTracker(self.store.client, self.store.uri, experiment)
            open_runs = [key for key in tracker.running_trials(name) if not _by_hand(tracker, key)]
            if self.store.client.get_run(run).info.status == "RUNNING":
                open_runs.append(run)
            if not open_runs or self._living(run):
                continue
            if not self.fix:
                found.wrong.append(
                    f"{name}: {len(open_runs)} runs are RUNNING, and no process drives the study. fix=true ends them."
                )
                continue
            try:
                with owned(tracker, name, self.root):
                    for key in open_runs:
                        tracker.end(key, "FINISHED" if tracker.result(key) else "KILLED", "its process has ended")
                found.mended.append(f"{name}: {len(open_runs)} runs are ended")
            except TrackingError as error:
                found.wrong.append(f"{name}: {error}")
        if found.wrong:
            found.told = "some runs are RUNNING without a process"
        return found

    def _leases(self, studies: dict[str, tuple[str, str]]) -> Finding:
        found, living = Finding("leases"), []
        for run, (name, _) in studies.items():
            for claim in claims_of(self.store.run(run)[0]):
                if is_running(claim.process) is not False:
                    living.append(f"{name} by {claim}")
                    continue
                free = partial(self.store.client.delete_tag, run, f"{LEASE}{claim.owner}")
                self._mend(found, f"{name}: owned by {claim}, whose process has ended", free)
        found.told = f"driven, or held by another host: {'; '.join(living)}" if living else "no study is driven"
        return found

    def _cache(self) -> Finding:
        found = Finding("cache")
        cache = self.root / "cache"
        kinds = [folder for folder in cache.glob("*") if folder.name not in OTHERS]
        files = sorted(file for folder in kinds for file in folder.glob("*.safetensors"))
        for file, reason in damaged(files):
            self._mend(found, f"{file} is damaged: {reason}", file.unlink)
        found.told = f"{len(files)} files, {len(found.wrong) + len(found.mended)} of them damaged"
        return found

    def _left_over(self) -> Finding:
        found = Finding("left over", "no temporary files and folders of processes that have ended")
        old = time.time() - LEFT
        for path in [*self.root.glob("scratch/*"), *self.root.glob("cache/**/*.tmp"), *self.root.glob("*.init-*")]:
            if path.lstat().st_mtime < old and not self._locked(path.name):
                self._mend(found, f"{path} is left over", partial(_delete, path))
        if found.wrong:
            found.told = "some temporary files and folders are left over"
        return found

    def _locked(self, name: str) -> bool:
        """Return whether `name` is the scratch folder of a study that a process of this folder drives."""
        lock = self.root / f".{name}.study.lock"
        if not lock.exists():
            return False
        try:
            with exclusive(lock, owner_of=name):
                return False
        except QflowError:
            return True

    def _registry(self) -> Finding:
        found, count = Finding("registry"), 0
        for name, version, tags in versions(self.store):
            count += 1
            run_id, promised = tags.get("qflow.run", ""), tags.get("qflow.qconfig", "")
            try:
                stored = self.store.run(run_id)[0].get("qflow.qconfig", promised) if run_id else promised
            except TrackingError:
                found.wrong.append(f"version {version} of {name} is of run {run_id}, which does not exist.")
                continue
            if stored != promised:
                found.wrong.append(f"version {version} of {name} has qconfig {promised}, its run {stored}.")
        found.told = f"{count} versions, each of a run that exists and has its qconfig"
        if found.wrong:
            found.told = f"of {count} versions some do not match their runs"
        return found

    def _living(self, run: str) -> bool:
        """Return whether the owner of a study lives, or may live on another host."""
        return any(is_running(claim.process) is not False for claim in claims_of(self.store.run(run)[0]))

    def _mend(self, found: Finding, what: str, act: Callable[[], None]) -> None:
        if not self.fix:
            found.wrong.append(f"{what}. fix=true removes it.")
            return
        try:
            act()
            found.mended.append(f"{what}: removed")
        except OSError as error:
            found.wrong.append(f"{what}, and cannot be removed: {error.strerror}.")


def _by_hand(tracker: MlflowTracker, run: str) -> bool:
    return tracker.run_tags(run).get("qflow.trial", "").startswith("-")


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
