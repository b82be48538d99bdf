"""The charts of a study as plain data for assets/charts.js: front, path of the search, importances, cost, training."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from qflow.core.names import trial_name
from qflow.report.charts import name_room
from qflow.report.study_record import StudyRecord, Training
from qflow.search.objective import meets, pareto_set
from qflow.search.outcome import FinishedTrial
from qflow.search.standing import Standing

LATENCY, DROP = "cost/latency_ms", "accuracy/drop"
LOW, HIGH = "cost/latency_low_ms", "cost/latency_high_ms"
ROOM = 0.06  # of an axis, beyond the outermost points


def front_chart(record: StudyRecord) -> dict[str, Any]:
    """Drop against the first aim beside the accuracy, with the goal, and intervals on the front and the baselines.

    Trials beyond the axis (diverged ones, say) are drawn at its edge, so that they do not flatten the others.
    """
    study, cost = record.searched, first_cost(record)
    every = [*study.trials, *study.by_hand]
    trials = [t for t in every if cost in t.outcome.metrics and DROP in t.outcome.metrics]
    low, high = drop_range(record, trials)
    named = {t.number for t in study.baselines.values()} | ({study.shown.number} if study.shown else set())
    front = {t.number for t in front_of(record)}
    rest = [t for t in trials if t.number not in named and t.number >= 0]
    inside = [t for t in rest if t.outcome.metrics[DROP] <= high and not t.stopped]
    edge = [t for t in rest if t not in inside]

    def series(name: str, color: str, mark: str, chosen: Sequence[FinishedTrial], **more: Any) -> dict[str, Any]:
        ranged = more.pop("ranged", False)
        points = [_point(record, t, cost, high, ranged) for t in chosen]
        return {"name": name if points else "", "color": color, "mark": mark, "points": points, **more}

    best = [study.shown] if study.shown in trials else []
    lists = [
        series(
            "meets the goal",
            "c2",
            "dot",
            [t for t in inside if meets(t) and t.number not in front],
            pale=len(inside) > 60,
        ),
        series("misses it", "c5", "dot", [t for t in inside if not meets(t) and t.number not in front], open=True),
        series("Pareto front", "c0", "diamond", [t for t in inside if t.number in front]),
        series("beyond the axis or ended early, at the edge", "c5", "triangle", edge),
    ]
    for label, trial in study.baselines.items():
        if trial.number != (study.shown.number if study.shown else -1) and trial in trials:
            lists.append(series(label, "c4", "square", [trial], ranged=True, size=6, label=label))
    lists += [series(trial_name(t.number, t.label), "c3", "square", [t], size=6) for t in study.by_hand if t in trials]
    title = "best" if study.best else "nearest miss"
    lists.append(series(title, "c1", "star", best, ranged=True, size=6, label=title))  # type: ignore[arg-type]
    return {
        "kind": "xy", "label": f"{len(trials)} trials: accuracy drop against {cost}", "height": 460,
        "x": {**_span([t.outcome.metrics[cost] for t in trials]), "title": _axis(cost)},
        "y": {"low": low, "high": high, "title": "accuracy drop"},
        "rules": [{"axis": "y", "at": study.goal.max_drop, "color": "c1", "text": f"goal {study.goal.max_drop:g}"}],
        "series": lists,
    }  # fmt: skip


def first_cost(record: StudyRecord) -> str:
    """The first aim beside the accuracy, or the latency where accuracy is the only one."""
    return next(iter(record.searched.goal.ranking), LATENCY)


def _axis(metric: str) -> str:
    return "predicted latency (ms)" if metric == LATENCY else metric


def front_of(record: StudyRecord) -> list[FinishedTrial]:
    """The trials that no other dominates, by the study's objectives."""
    goal = record.searched.goal
    return pareto_set(record.searched.whole, list(goal.optimize.values()))


def _point(record: StudyRecord, trial: FinishedTrial, cost: str, high: float, ranged: bool) -> list[Any]:
    m = trial.outcome.metrics
    y = high if trial.stopped else min(m[DROP], high)
    ends = [m[LOW], m[HIGH]] if ranged and cost == LATENCY and LOW in m and HIGH in m else []
    return [m[cost], y, trial_text(record, trial), record.run_address(trial), *ends]


def drop_range(record: StudyRecord, trials: Sequence[FinishedTrial]) -> tuple[float, float]:
    """Ends of the axis of drops: the goal, the baselines and the bulk of the trials are inside."""
    study = record.searched
    drops = sorted(t.outcome.metrics[DROP] for t in trials if not t.stopped) or [0.0]
    goal = study.goal.max_drop
    first, third = drops[len(drops) // 4], drops[(3 * len(drops)) // 4]
    bulk = third + 3.0 * max(third - first, 0.5 * goal)
    named = [t.outcome.metrics[DROP] for t in study.baselines.values() if t in trials]
    reach = [drop for drop in [*drops, *named] if drop <= max(bulk, 6.0 * goal) and math.isfinite(drop)]
    high, low = max([*reach, 1.3 * goal, 1e-9]), min(drops[0], 0.0)
    return low - ROOM * (high - low), high + ROOM * (high - low)


def _span(values: Sequence[float]) -> dict[str, float]:
    known = [v for v in values if math.isfinite(v)] or [0.0, 1.0]
    room = ROOM * (max(known) - min(known)) or 0.05 * abs(max(known)) or 1.0
    return {"low": min(known) - room, "high": max(known) + room}


def path_chart(record: StudyRecord) -> dict[str, Any]:
    """The first cost of every trial by number, and the best so far among those that meet the goal."""
    study, cost = record.searched, first_cost(record)
    trials = [t for t in study.trials if cost in t.outcome.metrics]
    best, standing = list[list[Any]](), Standing(study.goal.ranking)
    for trial in trials:
        if standing.after([trial]).best is trial and meets(trial):
            best.append(
                [trial.number, trial.outcome.metrics[cost], trial_text(record, trial), record.run_address(trial)]
            )
    line = [*best, [trials[-1].number, best[-1][1], ""]] if best else []

    def points(good: bool) -> list[list[Any]]:
        chosen = [t for t in trials if meets(t) is good]
        return [[t.number, t.outcome.metrics[cost], trial_text(record, t), record.run_address(t)] for t in chosen]

    return {
        "kind": "xy", "label": f"The path of the search over {len(trials)} trials", "height": 320,
        "x": {**_span([float(t.number) for t in trials]), "title": "trial"},
        "y": {**_span([t.outcome.metrics[cost] for t in trials]), "title": _axis(cost)},
        "series": [
            {"name": "meets the goal", "color": "c2", "mark": "dot", "size": 4, "points": points(True)},
            {"name": "misses it", "color": "c5", "mark": "dot", "size": 4, "open": True, "points": points(False)},
            {"name": "best so far" if best else "", "color": "c1", "line": "step", "points": line},
            {"name": "", "color": "c1", "mark": "star", "size": 4, "points": best},
        ],
    }  # fmt: skip


def trial_text(record: StudyRecord, trial: FinishedTrial) -> str:
    """What the tooltip of a trial shows."""
    m, accuracy = trial.outcome.metrics, record.searched.accuracy
    lines = [trial_name(trial.number, trial.label)]
    lines.append(f"{accuracy.split('/', 1)[1]} {m[accuracy]:.4f}, drop {m[DROP]:+.4f}")
    if LATENCY in m:
        lines.append(f"{m[LATENCY]:.3f} ms [{m.get(LOW, math.nan):.2f}, {m.get(HIGH, math.nan):.2f}]")
    lines.append(f"int16 ratio {m.get('qconfig/int16_ratio', 0.0):.2f}")
    lines += [f"{key} {value}" for key, value in trial.params.items()]
    if trial.stopped:
        lines.append(f"stopped {trial.stopped}: the metric is the worst possible")
    lines.append("meets the goal" if meets(trial) else "misses the goal")
    return "\n".join(lines)


def importance_chart(record: StudyRecord) -> dict[str, Any]:
    """A bar for each parameter, evaluator and metric."""
    found = record.searched.importances
    colors = {pair: f"c{number}" for number, pair in enumerate(found.shares)}
    rows = []
    for key in found.keys:
        for place, ((evaluator, metric), shares) in enumerate(found.shares.items()):
            share, what = shares.get(key, 0.0), f"{evaluator}, {metric}"
            rows.append(
                {"name": key if not place else "", "value": share, "color": colors[evaluator, metric],
                 "label": f"{share:.0%}", "text": f"{key}\n{what}: {share:.1%}"}
            )  # fmt: skip
    return {
        "kind": "bars", "label": "Importance of the parameters", "names": name_room(list(found.keys)), "high": 1.0,
        "legend": [{"name": ", ".join(pair), "color": color, "mark": "square"} for pair, color in colors.items()],
        "rows": rows,
    }  # fmt: skip


def training_chart(training: Training, what: str) -> dict[str, Any]:
    """Loss, or learning rate, by step."""
    values = list(training.losses if what == "loss" else training.rates)
    known = [v for v in values if math.isfinite(v)] or [0.0]
    log = what == "loss" and min(known) > 0.0 and max(known) / min(known) > 30.0
    span = {"low": min(known) / 1.2, "high": max(known) * 1.2, "log": True} if log else _span(known)
    points = [
        [step, value, f"step {step}: {value:.5g}"] for step, value in enumerate(values, 1) if math.isfinite(value)
    ]
    return {
        "kind": "xy", "label": f"{what} by step", "height": 260,
        "x": {**_span([1.0, float(len(values))]), "title": "step"},
        "y": {**span, "title": what},
        "series": [
            {"name": "", "color": "c0", "line": "straight", "points": points},
            {"name": "", "color": "c0", "mark": "dot", "size": 2, "points": points[:: max(1, len(points) // 200)]},
        ],
    }  # fmt: skip


def cost_chart(record: StudyRecord, top: int = 25) -> dict[str, Any]:
    """The costliest operators of the shown mix, with their time in all-int8."""
    shown, before = record.shown, record.mixes.get("all-int8")
    assert shown is not None
    rows: list[dict[str, Any]] = []
    for name, (ms, low, high) in sorted(shown.times.items(), key=lambda entry: -entry[1][0])[:top]:
        text = f"{name}\n{ms:.4f} ms [{low:.4f}, {high:.4f}]"
        rows.append({"name": name, "value": ms, "color": "c1", "label": f"{ms:.4f} ms", "text": text})
        if before is not None and name in before.times and before is not shown:
            was = before.times[name][0]
            bar = {
                "name": "",
                "value": was,
                "color": "c5",
                "label": f"{was:.4f} ms",
                "text": f"{name} in all-int8\n{was:.4f} ms",
            }
            rows += [bar] if abs(was - ms) > 1e-6 else []
    return {
        "kind": "bars", "label": "Predicted time of the operators", "names": name_room([r["name"] for r in rows]),
        "high": max((r["value"] for r in rows), default=1.0), "rows": rows,
        "legend": [{"name": "this mix", "color": "c1", "mark": "square"},
                   {"name": "all-int8, where it differs", "color": "c5", "mark": "square"}],
    }  # fmt: skip
