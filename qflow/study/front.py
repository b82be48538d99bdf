"""The best trial so far and the Pareto set after every trial, and the decisions, on the study's run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from qflow.core.record import to_json
from qflow.core.store import write_whole
from qflow.core.temporary import TemporaryFolder
from qflow.search.driver import Driver
from qflow.search.objective import Goal, meets
from qflow.search.outcome import FinishedTrial
from qflow.search.standing import Standing
from qflow.trial.record import metrics_of

DECISIONS, BASELINES = "qflow.decisions", "qflow.baselines"  # tags of the study's run, as JSON


def log_decisions(
    driver: Driver | None,
    study_run: str,
    decisions: Sequence[tuple[str, str]],
    baselines: Mapping[str, FinishedTrial],
) -> None:
    """Keep the decisions and the baselines' trials on the study's run, so that an interrupted study can be reported."""
    if driver is not None:  # else the study has not begun
        numbers = {label: trial.number for label, trial in baselines.items()}
        driver.spool.log_study(study_run, tags={DECISIONS: to_json(list(decisions)), BASELINES: to_json(numbers)})


def log_front(driver: Driver | None, study_run: str, standing: Standing, goal: Goal, root: Path) -> None:
    """Write studies/<study>/best.json and pareto.json under `root`, and log both with the best trial's metrics."""
    if driver is None:
        return
    study, best = driver.study.name, standing.best
    rows = [
        [t.number, t.label, *(t.outcome.metrics.get(name) for name in goal.optimize), meets(t), t.run_id]
        for t in sorted(standing.front, key=lambda t: t.outcome.objectives)
    ]
    table = {"columns": ["trial", "label", *goal.optimize, "meets the goal", "run"], "data": rows}
    metrics = best.outcome.metrics if best else {}
    state = {"study": study, "trial": best.number if best else None, "run": best.run_id if best else None}
    texts = {"pareto.json": to_json(table), "best.json": to_json({**state, "metrics": metrics}, indent=1)}
    folder = root / "studies" / study
    if all((folder / name).exists() and (folder / name).read_text() == text for name, text in texts.items()):
        return  # unchanged
    with TemporaryFolder() as beside:
        for name, text in texts.items():
            (Path(beside) / name).write_text(text)
        tags = {"qflow.best_so_far": best.run_id if best else ""}
        driver.spool.log_study(study_run, folder=Path(beside), metrics=metrics_of("best", metrics), tags=tags)
    for name, text in texts.items():  # last, so that after a kill the next start logs both again
        write_whole(folder / name, text)
