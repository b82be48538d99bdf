"""The study: a fixed space, points that do not repeat, fixed trials, two processes, kills in its making."""

from __future__ import annotations

import os
import signal
import sqlite3
from pathlib import Path

import pytest

from qflow.core.errors import ConfigError, TrackingError
from qflow.core.store import build_aside, exclusive, sqlite_path
from qflow.search.domain import Choice, Interval, Range
from qflow.search.proposal import SAMPLERS
from qflow.search.study import Study

pytestmark = pytest.mark.slow  # real stores on disk

SPACE = {
    "calib.method": Choice(("minmax", "kl", "mse")),
    "int16_ratio": Interval(0, 1),
    "lr": Interval(1e-5, 1e-2, log=True),
    "steps": Interval(1, 8, integer=True),
    "percentile": Range(0.1, 0.5, 0.1),
}


def open_study(folder: Path, name: str = "task/stage", **changes) -> Study:
    options = {"space": SPACE, "directions": ("maximize", "minimize"), "sampler": "random", "n_trials": 20}
    return Study.open(folder, name, **{**options, **changes})


def test_optuna_knows_its_objectives_by_name(store):
    import optuna

    for _ in range(2):  # a study that continues keeps them
        open_study(store, metrics=["accuracy/found", "cost/latency_ms"]).begin()
    found = optuna.load_study(study_name="task/stage", storage=f"sqlite:///{store}/optuna.db")
    assert found.metric_names == ["accuracy/found", "cost/latency_ms"]


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_proposes_inside_the_space(store, sampler):
    study = open_study(store, sampler=sampler, n_trials=8)
    for _ in range(6):  # beyond the random start of 2 trials
        proposal = study.ask()
        assert all(SPACE[key].contains(value) for key, value in proposal.params.items())
        study.set_result(proposal.number, {"drop": proposal.params["int16_ratio"] - 0.5}, "{}")
        study.complete(proposal.number, (proposal.params["int16_ratio"], float(proposal.number)))
    assert [t.state for t in study.trials()] == ["complete"] * 6


def test_values_constraints_and_marker_are_kept(store):
    study = open_study(store)
    number = study.ask().number
    study.link(number, "run-1")
    study.set_result(number, {"drop": -0.25}, "marker")
    study.set_result(number, {"drop": -0.25}, "marker")  # twice changes nothing
    study.complete(number, (0.75, 3.0))
    study.complete(number, (0.0, 0.0))  # nor does telling twice
    kept = open_study(store).trials()[0]
    assert (kept.objectives, dict(kept.constraints), kept.marker, kept.run_id) == (
        (0.75, 3.0), {"drop": -0.25}, "marker", "run-1",
    )  # fmt: skip


def test_a_running_trial_of_another_process_can_be_told(store):
    number = open_study(store).ask().number
    other = open_study(store)
    other.set_result(number, {"drop": 1.0}, "marker")
    other.complete(number, (0.5, 1.0))
    assert dict(other.trials()[0].constraints) == {"drop": 1.0}


def test_a_reopened_study_does_not_repeat_points(store, tmp_path):
    points = []
    for _ in range(3):  # each time with the same seed in the configuration
        study = open_study(store, seed=7)
        points += [study.ask().params["int16_ratio"] for _ in range(3)]
    assert len(set(points)) == 9
    assert [open_study(store, "other", seed=7).ask().params for _ in range(1)] == [
        open_study(tmp_path / "elsewhere", "other", seed=7).ask().params
    ]


def test_fixed_points_come_first_with_values_outside_the_space(store):
    study = open_study(store)
    study.enqueue({"int16_ratio": 1.5, "calib.method": "percentile", "lr": 0.0, "extra": 3}, label="odd")
    study.enqueue({"int16_ratio": 0}, label="all-int8")
    odd, low = study.ask(), study.ask()
    assert odd.label == "odd"
    wanted = {"int16_ratio": 1.5, "calib.method": "percentile", "lr": 0.0, "extra": 3}
    assert {key: odd.params[key] for key in wanted} == wanted
    assert low.label == "all-int8"
    assert low.params["int16_ratio"] == 0.0
    study.complete(odd.number, (1.0, 1.0))
    study.complete(low.number, (1.0, 1.0))
    assert study.ask().label == ""
    assert open_study(store, sampler="tpe", n_trials=4).ask().number == 3  # TPE lives with such trials


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"space": {**SPACE, "steps": Interval(1, 9, integer=True)}}, "steps"),
        ({"space": {key: SPACE[key] for key in ("lr", "int16_ratio")}}, "calib.method, percentile, steps"),
        ({"directions": ("maximize", "maximize")}, "directions"),
        ({"directions": ("maximize",)}, "directions"),
    ],
)
def test_another_space_under_the_same_name_is_refused(store, changes, named):
    open_study(store).enqueue({})
    with pytest.raises(ConfigError, match=f"changed: {named}.*study=.*-2") as caught:
        open_study(store, **changes)
    assert "\n" not in str(caught.value)
    open_study(store, "other", **changes)


def test_a_study_without_a_trial_takes_another_space(store):
    """A start that was refused for its data, say, binds nobody to what it asked for."""
    open_study(store)
    space = {"lr": SPACE["lr"]}
    open_study(store, space=space).enqueue({})
    assert open_study(store, space=space).space == space


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampler": "cmaes"}, "one of tpe, nsga2"),
        ({"directions": ()}, "maximize or minimize"),
        ({"directions": ("up",)}, "maximize or minimize"),
        ({"space": {}}, "needs a key that is open"),
        ({"space": {"a": Choice((1, True))}}, "true from 1 nor false from 0, but got both for a"),
        ({"name": "it's"}, "study name"),
    ],
)
def test_wrong_arguments_are_refused(store, changes, message):
    with pytest.raises(ConfigError, match=message):
        open_study(store, **changes)


def test_a_broken_database_is_refused_in_one_line(tmp_path):
    (tmp_path / "optuna.db").write_text("no database " * 100)
    with pytest.raises(TrackingError, match="must open") as caught:
        open_study(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_second_driver_is_refused_with_the_process_that_holds_it(store):
    study, other = open_study(store), open_study(store, "other")
    with (
        study.driver(),
        other.driver(),
        pytest.raises(TrackingError, match=f"'task/stage'.*process {os.getpid()} "),
        open_study(store).driver(),
    ):
        pass
    with study.driver():
        pass


def test_the_database_is_in_wal_mode_and_leaves_no_building_site(tmp_path):
    open_study(tmp_path)
    with sqlite3.connect(tmp_path / "optuna.db") as connection:
        assert connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
    assert not list(tmp_path.glob("*.init-*"))


def test_a_kill_while_building_leaves_the_place_empty(tmp_path):
    path = tmp_path / "some.db"

    def die(url: str) -> None:
        file = sqlite_path(url)
        assert file is not None
        file.write_bytes(b"half a database")
        os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if child == 0:
        build_aside(path, die)
        os._exit(1)
    assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL
    assert not path.exists()
    assert len(list(tmp_path.glob("some.db.init-*"))) == 1
    build_aside(path, lambda url: sqlite3.connect(str(sqlite_path(url))).close())
    assert path.exists()
    assert not list(tmp_path.glob("some.db.init-*"))


def test_a_lock_ends_with_its_process(tmp_path):
    child = os.fork()
    if child == 0:
        with exclusive(tmp_path / "lock", owner_of="it"):
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    with exclusive(tmp_path / "lock", owner_of="it"):
        pass
