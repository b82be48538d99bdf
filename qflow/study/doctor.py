"""The invariants of a store and a folder, each looked at by itself, and what can be mended without losing a result."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from qflow.analysis.badcases.state import read_state
from qflow.core.credentials import masked
from qflow.core.errors import QflowError, TrackingError
from qflow.core.store import exclusive, sqlite_path
from qflow.core.temporary import PREFIX, left_over
from qflow.process.running import is_running
from qflow.quant.train.checkpoint import read_checkpoint
from qflow.search.carried import study_names
from qflow.search.reconcile import check_invariants
from qflow.search.spool import spool_of, waiting
from qflow.search.study import IDENTITY, Study
from qflow.study.identity import HOME, home
from qflow.tracking.artifacts import Store
from qflow.tracking.ended import abandoned, end_abandoned, own_running
from qflow.tracking.lease import LEASE, claims_of, owned
from qflow.tracking.mlflow_tracker import MlflowTracker
from qflow.tracking.registry import versions
from qflow.trial.cache import damaged

LEFT = 3600.0  # seconds after which a temporary file belongs to no process that still writes it
OTHERS = ("training", "searches")
"""Folders in cache/ whose files have another form."""
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
            self._kept(studies),
            self._cache(),
            self._checkpoints(),
            self._left_over(),
            self._registry(),
        ]

    def _agreement(self, studies: dict[str, tuple[str, str]]) -> Finding:
        """Compare every trial of a search with its run; look for searches without runs, and runs without a search."""
        known, found, here = set(study_names(self.storage)), Finding("studies"), 0
        for run, (name, experiment) in studies.items():
            if self._living(run):
                continue
            tracker = MlflowTracker(self.store.client, self.store.uri, experiment)
            if name not in known:
                if self._is_of_this_folder(run) and any(n >= 0 and text for _, n, _, text in tracker.trial_runs(name)):
                    found.wrong.append(
                        f"{name}: its runs are of this folder, and its search is not in {masked(str(self.storage))}. "
                        "Name its search.storage, or restore the database."
                    )
                continue
            study = Study.read(self.storage, name)
            if study.identity and study.identity != self.store.run(run)[0].get(IDENTITY, study.identity):
                continue  # of another folder; its own search is looked for below
            known.discard(name)
            if not self._idle(run, name):
                continue  # what waits is told by itself
            here += 1
            problems = check_invariants(study, tracker)
            found.wrong += [f"{name}: {text}{AGAIN if 'running' in text.lower() else ''}" for text in problems]
        driven = {name for run, (name, _) in studies.items() if self._living(run)}
        for name in sorted(known - driven):
            count = sum(trial.state == "complete" for trial in Study.read(self.storage, name).trials())
            if count:
                found.wrong.append(
                    f"{name}: its search has {count} finished trials, whose runs are not in {masked(self.store.uri)}. "
                    "Name its tracking.uri, or restore the store."
                )
        found.told = f"{here} studies of this folder agree with their runs"
        if here == 1:
            found.told = "the study of this folder agrees with its runs"
        if found.wrong:
            found.told = "some studies do not agree with their runs"
        return found

    def _is_of_this_folder(self, run: str) -> bool:
        """True for a study that was begun in this folder, or whose runs are in this folder's own store."""
        file = sqlite_path(self.store.uri)
        own_store = file is not None and file.parent == self.root
        return own_store or self.store.run(run)[0].get(HOME) == home(self.root)

    def _runs(self, studies: dict[str, tuple[str, str]]) -> Finding:
        """Find runs that are RUNNING without a process; mending them ends them, committed ones as such."""
        found = Finding("runs", "no run is RUNNING without a process")
        for experiment in sorted({experiment for _, experiment in studies.values()}):
            tracker = MlflowTracker(self.store.client, self.store.uri, experiment)
            if left := [run for run, tags in own_running(tracker).items() if abandoned(tags)]:
                end = partial(end_abandoned, tracker)
                self._mend(found, f"{len(left)} runs are RUNNING, and the process of each has ended", end, "ends them")
        for run, (name, experiment) in studies.items():
            tracker = MlflowTracker(self.store.client, self.store.uri, experiment)
            by_processes = own_running(tracker)
            open_runs = [key for key in [*tracker.running_trials(name), run] if key not in by_processes]
            open_runs = [key for key in open_runs if self.store.client.get_run(key).info.status == "RUNNING"]
            if open_runs and self._idle(run, name):
                end = partial(self._end, tracker, name, open_runs)
                what = f"{name}: {len(open_runs)} runs are RUNNING, and no process drives the study"
                self._mend(found, what, end, "ends them")
        if found.wrong:
            found.told = "some runs are RUNNING without a process"
        return found

    def _end(self, tracker: MlflowTracker, name: str, open_runs: list[str]) -> None:
        with owned(tracker, name, self.root):
            for key in open_runs:
                tracker.end(key, "FINISHED" if tracker.result(key) else "KILLED", "its process has ended")

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

    def _kept(self, studies: dict[str, tuple[str, str]]) -> Finding:
        found = Finding("spool", "no result waits on disk to be delivered")
        for run, (name, _) in studies.items():
            if not self._living(run) and (kept := waiting(spool_of(self.root, name))):
                found.wrong.append(
                    f"{name}: {len(kept)} writes wait in {kept[0].parent}. Start its qflow.tune: it delivers them."
                )
        if found.wrong:
            found.told = "results wait on disk to be delivered"
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

    def _checkpoints(self) -> Finding:
        """Read what trainings and long searches for bad cases continue from."""
        found, cache = Finding("checkpoints"), self.root / "cache"
        files = [*cache.glob("training/**/*.safetensors"), *cache.glob("searches/*.pt")]
        for file in sorted(files):
            try:
                read_state(file, {}) if file.suffix == ".pt" else read_checkpoint(file)
            except (QflowError, ValueError, KeyError, TypeError) as error:
                what = f"{file} cannot be read ({type(error).__name__}), so that what it continues would start over"
                self._mend(found, what, file.unlink)
        found.told = f"{len(files)} of trainings and searches, {len(found.wrong) + len(found.mended)} of them damaged"
        return found

    def _left_over(self) -> Finding:
        found = Finding("left over", "no temporary files and folders of processes that have ended")
        tops = [path for path in self.root.iterdir() if path.is_dir() and path.name != "artifacts"]
        places = {path.parent for top in tops for path in top.rglob(f"{PREFIX}*")}
        for place in sorted({self.root, Path(tempfile.gettempdir()), *places}):
            for path in list(left_over(place)):
                self._mend(found, f"{path} is left over", partial(_delete, path))
        old = time.time() - LEFT
        for path in [*self.root.glob("scratch/*"), *self.root.glob("*.init-*")]:
            if path.exists() and path.lstat().st_mtime < old and not self._locked(path.name):
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

    def _idle(self, run: str, name: str) -> bool:
        """Return whether nobody drives a study, and nothing waits to be delivered to its runs."""
        return not self._living(run) and not waiting(spool_of(self.root, name))

    def _living(self, run: str) -> bool:
        """Return whether the owner of a study lives, or may live on another host."""
        return any(is_running(claim.process) is not False for claim in claims_of(self.store.run(run)[0]))

    def _mend(self, found: Finding, what: str, act: Callable[[], None], does: str = "removes it") -> None:
        if not self.fix:
            found.wrong.append(f"{what}. fix=true {does}.")
            return
        try:
            act()
            found.mended.append(f"{what}: done")
        except (OSError, TrackingError) as error:
            found.wrong.append(f"{what}, which stays so: {getattr(error, 'strerror', None) or error}")


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
