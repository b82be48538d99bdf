"""The Optuna study of a search, in a database.
Each proposal asks for the keys of the space one by one, parents first (define-by-run), because keys may depend on each
other. Of the samplers only TPE (with groups) learns about a key that some trials lack; NSGA-II and GP draw such a key
at random. Constraints follow Optuna 5: `<= 0` is feasible, and a trial without constraints counts as feasible. The user
attributes of a trial hold its MLflow run, its commit marker and, if it failed, how it ended.
"""

from __future__ import annotations

import logging
import uuid
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import optuna
from optuna.samplers import BaseSampler
from optuna.trial import FrozenTrial, TrialState, create_trial

from qflow.core.store import exclusive, sqlite_path
from qflow.core.stored_text import REASON, stored_text
from qflow.search.database import open_storage, open_study, place_of
from qflow.search.domain import (
    NOTHING,
    Choice,
    Domain,
    Interval,
    Scalar,
    Space,
    Values,
    applicable,
    applies,
    as_proposed,
    parents_first,
)
from qflow.search.patient_storage import Call, make_patient
from qflow.search.proposal import Proposal, StudyTrial, check_arguments
from qflow.search.sampler import make_sampler, quiet
from qflow.search.terms import Terms, late_run, note_late_run, note_run, require_run

IDENTITY = "qflow.study_id"
"""User attribute of an Optuna study, and tag of the MLflow run that belongs to it."""
STOPPED = ("lost", "interrupted")
"""How a trial ended that the stop of its process ended."""
_STATES = {
    TrialState.RUNNING: "running",
    TrialState.WAITING: "waiting",
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "fail",
    TrialState.FAIL: "fail",
}


class Study:
    """An Optuna study with a fixed space; open it with `Study.open`."""

    def __init__(
        self, study: optuna.Study, terms: Terms, lock: Path, sampler: Callable[[int], BaseSampler], shared: bool
    ) -> None:
        self.name = study.study_name
        self.space = dict(terms.space)
        self.directions = terms.directions
        self.shared = shared
        """Whether the search is in a database that other folders may name too (search.storage)."""
        self._study, self._terms, self._lock, self._sampler = study, terms, lock, sampler
        self._asked: dict[int, optuna.Trial] = {}
        self._order = parents_first(terms.space)
        self._begun = False

    @classmethod
    def open(
        cls, storage: str | Path, name: str, *, space: Space, directions: tuple[str, ...],
        sampler: str = "tpe", seed: int = 0, n_trials: int = 100, metrics: Sequence[str] = (),
        locks: Path | None = None, patient: Call | None = None,
    ) -> Study:  # fmt: skip
        """Open or create the study `name` in a database file, a folder (as optuna.db in it) or at a URL.

        `metrics` are the names of the objectives, which optuna-dashboard shows; `locks` is the folder of the lock file,
        by default that of the database. A call to a server goes through `patient`, which waits while that is away.

        Raises ConfigError if the study exists with another space or other directions, or if an argument is not
        allowed; TrackingError if the database cannot be opened.
        """
        check_arguments(name, space, directions, sampler)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        # if a statement is interrupted, SQLAlchemy drops the connection and logs a traceback
        logging.getLogger("sqlalchemy.pool").setLevel(logging.CRITICAL)
        url, lock_folder = place_of(storage)
        study, file = open_study(url, name, directions), sqlite_path(url)
        if patient and file is None:
            make_patient(study, patient)
        terms = Terms(study, space, directions, metrics)
        terms.require()  # and written by the owner of the study (`begin`)

        def seeded(asked: int) -> BaseSampler:
            return make_sampler(sampler, zlib.crc32(f"{seed}/{name}/{asked}".encode()), n_trials)

        folder = (locks or lock_folder).absolute()
        shared = file is None or file.parent != folder
        return cls(study, terms, folder / f".{quote(name, safe='')}.study.lock", seeded, shared)

    @classmethod
    def read(cls, storage: str | Path, name: str) -> Study:
        """Open a study that exists, to be looked at: it has no space, and its points are as they were stored."""
        study = optuna.load_study(study_name=name, storage=open_storage(place_of(storage)[0]))
        return cls(study, Terms(study, {}, ()), Path(), lambda asked: make_sampler("random", asked, 1), False)

    def require_same(self, run: str | None) -> None:
        """Check before anything is written that the study still is the one that was opened; the caller owns it.

        Raises ConfigError if it was begun with another space meanwhile, TrackingError if a search that folders share
        has another run in MLflow than `run`: two tracking stores cannot agree on one owner.
        """
        self._terms.require()
        if self.shared:
            require_run(self._study, run)

    def begin(self, run: str = "") -> None:
        """Write space, directions, names of the objectives and the run of the study; the caller owns the study."""
        if not self._begun:
            self._terms.write()
            self._begun = True
        if run and self.shared:
            note_run(self._study, run)

    @property
    def identity(self) -> str:
        """What tells this study from another of the same name, wherever that is; an empty text before `identify`."""
        return str(self._study.user_attrs.get(IDENTITY, ""))

    def identify(self) -> None:
        """Give the study an identity, if it has none; the caller owns the study."""
        if not self.identity:
            self._study.set_user_attr(IDENTITY, uuid.uuid4().hex)

    def driver(self) -> AbstractContextManager[None]:
        """Return the lock for adding trials. Entering it raises TrackingError while another process holds it."""
        return exclusive(self._lock, owner_of=f"study '{self.name}'")

    def enqueue(self, params: Values, *, label: str = "", attempt: int = 0, retry_of: int | None = None) -> None:
        """Queue a point before the sampler's proposals. The sampler chooses values for missing keys that apply.

        A value outside the space (another choice, a key that is not searched) is evaluated too; the sampler then
        records a value of its own in its place.
        """
        self.begin()
        known = {k: v for k, v in params.items() if k in self.space and _expressible(self.space[k], v)}
        attrs: dict[str, Any] = {"label": label, "try": attempt, "fixed": dict(params)}
        if retry_of is None:
            self._study.enqueue_trial(known, user_attrs=attrs)
            return
        lost = self._study.get_trials(deepcopy=False)[retry_of]  # NSGA-II would not count it in its generation again
        kept = {key: value for key, value in lost.system_attrs.items() if key.endswith(":generation")}
        again = create_trial(
            state=TrialState.WAITING,
            user_attrs={**attrs, "retry_of": retry_of},
            system_attrs={"fixed_params": known, **kept},  # what enqueue_trial writes
        )
        self._study.add_trial(again)

    def enqueue_once(self, params: Values, *, label: str = "") -> None:
        """Queue a point unless it is queued already."""
        point = self.point(params)
        if not any(trial.state == "waiting" and trial.params == point for trial in self.trials()):
            self.enqueue(params, label=label)

    def point(self, params: Values) -> dict[str, Scalar]:
        """Return `params` in the types of the space, with sorted keys, so that equal points compare equal."""
        return self._point({}, {"fixed": params})

    def ask(self, kept: Values = NOTHING, inside: Callable[[Values], Values] = as_proposed) -> Proposal:
        """Return the next point: the next queued one, else the sampler's with the values of `kept` in it.

        `inside` takes the sampler's point and returns the values that are added to it or replace its own. The sampler
        is asked for a key only if its conditions hold, so that it learns from the keys that a trial had.

        Each proposal has a seed of its own, by the number of earlier trials without those that a stop ended, so that a
        search that was stopped and continued makes the proposals that it would have made without the stop.
        """
        self.begin()
        point: dict[str, Scalar] = {}
        absent: set[str] = set()
        begun = (t for t in self._study.get_trials(deepcopy=False) if t.state != TrialState.WAITING)
        asked = sum(trial.user_attrs.get("end", {}).get("ending") not in STOPPED for trial in begun)
        self._study.sampler = self._sampler(asked)
        with quiet(self._study.sampler):
            trial = self._study.ask()
            attrs = trial.user_attrs
            queued = "fixed" in attrs
            if kept and not queued:
                attrs = {**attrs, "fixed": dict(kept)}
                trial.set_user_attr("fixed", attrs["fixed"])
            fixed = attrs.get("fixed", {})
            for key in self._order:
                if applies(self.space, key, point, absent):
                    value = _suggest(trial, key, self.space[key])
                    point[key] = self.space[key].normal(fixed.get(key, value))
                else:
                    absent.add(key)
        self._asked[trial.number] = trial
        if not queued and (more := inside(self._point(trial.params, attrs))):
            attrs = {**attrs, "fixed": {**fixed, **more}}
            trial.set_user_attr("fixed", attrs["fixed"])
        return Proposal(trial.number, self._point(trial.params, attrs), attrs.get("label", ""))

    def link(self, number: int, run_id: str) -> None:
        """Store the MLflow run of a trial, which may have ended."""
        if number in self._asked or not self._study.get_trials(deepcopy=False)[number].state.is_finished():
            self._trial(number).set_user_attr("mlflow_run_id", run_id)
        else:
            note_late_run(self._study, number, run_id)

    def set_result(self, number: int, constraints: Mapping[str, float], marker: str) -> None:
        """Store constraints and marker of a running trial; a second call changes nothing."""
        trial = self._trial(number)
        for name in sorted(constraints.keys() - trial.constraints.keys()):
            trial.set_constraint(name, constraints[name])
        if trial.user_attrs.get("marker") != marker:
            trial.set_user_attr("marker", marker)

    def complete(self, number: int, objectives: tuple[float, ...]) -> None:
        """Complete a trial with its values; a trial that is complete already stays as it is."""
        self._study.tell(number, list(objectives), state=TrialState.COMPLETE, skip_if_finished=True)
        self._asked.pop(number, None)

    def fail(self, number: int, ending: str, reason: str) -> None:
        """End a running trial without values, for `reason`; `ending` is one of those of StudyTrial."""
        self._trial(number).set_user_attr("end", {"ending": ending, "reason": stored_text(reason, REASON)})
        self._study.tell(number, state=TrialState.FAIL, skip_if_finished=True)
        self._asked.pop(number, None)

    def trials(self) -> list[StudyTrial]:
        """Return every trial, by number."""
        found = self._study.get_trials(deepcopy=False)
        unlinked = any(t.state == TrialState.COMPLETE and "mlflow_run_id" not in t.user_attrs for t in found)
        late = self._study.user_attrs if unlinked else {}
        return [self._kept(trial, late) for trial in found]

    def _trial(self, number: int) -> optuna.Trial:
        if number not in self._asked:  # a trial that a dead process left running
            self._asked[number] = optuna.Trial(self._study, self._study.get_trials(deepcopy=False)[number]._trial_id)
        return self._asked[number]

    def _point(self, params: Mapping[str, Any], attrs: Mapping[str, Any]) -> dict[str, Scalar]:
        point = {**params, **attrs.get("fixed", {})}
        normal = {key: self.space[key].normal(v) if key in self.space else v for key, v in sorted(point.items())}
        return applicable(self.space, normal)

    def _kept(self, trial: FrozenTrial, late: Mapping[str, Any]) -> StudyTrial:
        attrs = trial.user_attrs
        end = attrs.get("end", {})
        return StudyTrial(
            number=trial.number,
            state=_STATES[trial.state],
            params=self._point(trial.params, attrs),
            label=attrs.get("label", ""),
            objectives=tuple(trial.values or ()),
            constraints=dict(trial.constraints),
            run_id=attrs.get("mlflow_run_id") or late_run(late, trial.number),
            marker=attrs.get("marker"),
            attempt=attrs.get("try", 0),
            ending=end.get("ending", ""),
            reason=end.get("reason", ""),
        )


def _suggest(trial: optuna.Trial, key: str, domain: Domain) -> Scalar:
    """Return the sampler's value of a key. The distribution must be the same at every start, or Optuna raises."""
    value: Scalar
    if isinstance(domain, Choice):
        value = trial.suggest_categorical(key, domain.values)
    elif isinstance(domain, Interval) and domain.integer:
        value = trial.suggest_int(key, int(domain.low), int(domain.high), log=domain.log)
    elif isinstance(domain, Interval):
        value = trial.suggest_float(key, domain.low, domain.high, log=domain.log)
    else:
        last = domain.start + (domain.count() - 1) * domain.step
        if domain.integer:
            value = trial.suggest_int(key, int(domain.start), int(last), step=int(domain.step))
        else:
            value = trial.suggest_float(key, domain.start, float(f"{last:.12g}"), step=domain.step)
    return value


def _expressible(domain: Domain, value: Scalar) -> bool:
    """Return whether Optuna can store `value`: a known choice, or a number, which may be out of range."""
    if isinstance(domain, Choice):
        return domain.contains(value)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return False
    if domain.integer and not float(value).is_integer():
        return False
    return value > 0 or not (isinstance(domain, Interval) and domain.log)
