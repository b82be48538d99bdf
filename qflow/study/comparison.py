"""Trials side by side, from their files alone: metrics with their noise, cost, and the operators that differ.

The noise of a difference is paired by sample where both trials have a score a sample, else a bound (search/noise.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qflow.bundle.bounded import read_json
from qflow.bundle.files import WEIGHTS
from qflow.bundle.stored import StoredTrial
from qflow.core.agreement import meaning
from qflow.core.errors import BundleError, QflowError
from qflow.core.names import trial_name
from qflow.core.qconfig import OpQConfig, QConfig
from qflow.core.record import from_dict
from qflow.core.text_file import read_text
from qflow.cost_model.records import Change
from qflow.report.files import SCORES
from qflow.search.noise import Noise, difference_noise
from qflow.search.outcome import STOPPED, Marker
from qflow.study.manifest import SEQUENCES
from qflow.study.rebuild import PARTS
from qflow.tracking.mlflow_tracker import RESULT

SURE = 1.96  # standard errors on each side of 95 % of a normal distribution
LATENCY = ("cost/latency_ms", "cost/latency_low_ms", "cost/latency_high_ms")


@dataclass(frozen=True)
class Side:
    """One of the trials: what is compared of it."""

    source: str
    title: str
    qconfig: QConfig
    metrics: Mapping[str, float] = field(default_factory=dict)
    times: Mapping[str, tuple[str, float, float, float]] = field(default_factory=dict)
    """Operator -> dtypes, and its time in ms: lowest, likely, highest."""
    sensitivities: Mapping[str, float] = field(default_factory=dict)
    """Operator -> sensitivity of its output at int8."""
    manifest: Mapping[str, Any] = field(default_factory=dict)
    device: str = ""
    scores: tuple[float, ...] = ()
    """Of each evaluation sample; empty if the trial does not have them."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """The trial's params: calibration, qconfig and training."""
    files: Mapping[str, str] = field(default_factory=dict)
    """Part -> digest: the calibrated scales, and the weights if the trial was trained."""
    stopped: str = ""
    """After how many samples the evaluation ended early; its metric is then the worst possible one."""


@dataclass(frozen=True)
class MetricChange:
    """A metric of two trials."""

    name: str
    before: float | None
    after: float | None
    noise: float | None = None
    """Half the width of the interval in which 95 % of the differences by chance lie; None if it is not known."""
    how: str = ""
    """How the noise was found, or why it is not known."""

    @property
    def change(self) -> float | None:
        """The difference; None where one is missing."""
        return None if self.before is None or self.after is None else self.after - self.before

    @property
    def verdict(self) -> str:
        """Whether the difference is beyond the noise, in words; empty where there is no noise or no difference."""
        if self.noise is None or not self.change:
            return ""
        return f"+-{self.noise:.3g}: {'beyond it' if abs(self.change) > self.noise else 'within it'}"


@dataclass(frozen=True)
class OperatorChange:
    """An operator whose precision differs, and what the difference gains and costs."""

    op: str
    before: str
    after: str
    sensitivity: float | None
    """Of its output at int8."""
    share: float | None
    """Of the sensitivities of all operators."""
    before_ms: float | None
    after_ms: float | None
    gain: str


@dataclass(frozen=True)
class Comparison:
    """A trial against the first one."""

    before: str
    after: str
    metrics: tuple[MetricChange, ...]
    bpu: Change | None
    """BPU time of the second over the first; operators that are the same in both cancel."""
    operators: tuple[OperatorChange, ...]
    count: int
    differences: tuple[str, ...] = ()
    """What else differs, in words: data, device, settings, scales, weights."""
    notes: tuple[str, ...] = ()
    """What was not compared, and why."""

    @property
    def equal(self) -> bool:
        """True if all that was compared is equal."""
        same = all(m.before == m.after for m in self.metrics)
        return same and not self.operators and not self.differences


def side_of(trial: StoredTrial) -> Side:
    """Return what is compared of a stored trial. Raises BundleError if its files do not hold what qflow writes."""
    found, tags = trial.sensitivities, trial.tags
    try:
        outcome = Marker.from_json(tags[RESULT]).outcome
        named = trial_name(int(tags.get("qflow.trial", "0")), tags.get("qflow.label", ""))
        scores = tuple(map(float, read_json(trial.folder, SCORES))) if SCORES in trial.files else ()
        return Side(
            source=trial.source,
            title=f"{named} of {tags.get('qflow.study', '?')}, run {trial.run_id[:8]}",
            qconfig=trial.qconfig,
            metrics=trial.metrics,
            times=_times(trial.folder),
            sensitivities=found.activation_scores("qint8") if found else {},
            manifest={
                **trial.manifest,
                "eval_samples": int(trial.manifest.get("eval_samples", 0)),
                SEQUENCES: tuple(map(int, trial.manifest.get(SEQUENCES, ()))),
            },
            scores=scores,
            device=f"{trial.config.device.march} under OpenExplorer {trial.config.device.oe_version}",
            settings=dict(outcome.params),
            files={
                "calibrated scales": tags.get("qflow.scales", ""),
                "trained weights": trial.files.get(WEIGHTS, "") if trial.trained else "",
            },
            stopped=tags.get(STOPPED, ""),
        )
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        text = " ".join(str(error).split())[:120]
        raise BundleError(f"Files of {trial.source} hold what qflow writes, but got: {text}. Take another.") from error


def side_of_json(path: Path) -> Side:
    """Return what is compared of a JSON file: the qconfig alone. Raises BundleError for another file."""
    rule = "A .json file holds a qconfig that qflow wrote"
    text = read_text(path, rule)
    try:
        content = json.loads(text)
        found = content["applied"] if isinstance(content.get("applied"), dict) else content
        return Side(str(path), f"qconfig of {path.name}", from_dict(QConfig, found))
    except RecursionError as error:
        raise BundleError(f"{rule}, but got {path}, which is nested too deep. Take another.") from error
    except (ValueError, AttributeError, TypeError, QflowError) as error:
        why = "no mapping" if isinstance(error, AttributeError) else " ".join(str(error).split())[:120]
        raise BundleError(f"{rule}, but got {path}: {why}. Take another.") from error


def _times(folder: Path) -> dict[str, tuple[str, float, float, float]]:
    """Read the table of cost.json: operator -> dtypes and times."""
    table = read_json(folder, "cost.json")
    at = [table["columns"].index(name) for name in ("Name", "Dtypes", "Low (ms)", "Time (ms)", "High (ms)")]
    rows = [[row[i] for i in at] for row in table["data"]]
    return {str(name): (str(dtypes), float(low), float(ms), float(high)) for name, dtypes, low, ms, high in rows}


def compare(before: Side, after: Side) -> Comparison:
    """Return how `after` differs from `before`."""
    names = dict.fromkeys([*before.metrics, *after.metrics])
    differ = [
        f"their {name} differ: the numbers are of other things"
        for part, name in PARTS.items()
        if before.manifest and after.manifest and before.manifest.get(part) != after.manifest.get(part)
    ]
    if before.device and after.device and before.device != after.device:
        differ.append(f"their devices differ: {before.device}, and {after.device}")
    if before.metrics and after.metrics:
        changed = {
            key: [side.settings.get(key, "-") for side in (before, after)]
            for key in dict.fromkeys([*before.settings, *after.settings])
        }
        differ += [f"{key}: {a} and {b}" for key, (a, b) in changed.items() if a != b]
        parts = dict.fromkeys([*before.files, *after.files])
        differ += [f"their {name} differ" for name in parts if before.files.get(name) != after.files.get(name)]
    sides = (before, after)
    notes = [f"{s.title} has no figures: only qconfigs are compared" for s in sides if not s.metrics]
    notes += [
        f"{s.title} ended {s.stopped}: its metric is the worst possible, not measured" for s in sides if s.stopped
    ]
    notes += filter(None, (meaning(name.partition("/")[2]) for name in names if _of_task(name)))
    noise = _noise(before, after)
    return Comparison(
        before.title,
        after.title,
        tuple(_metric(name, before, after, noise) for name in names if before.metrics and after.metrics),
        _bpu(before, after) if before.times and before.times.keys() == after.times.keys() else None,
        tuple(_operator(name, pair, before, after) for name, pair in before.qconfig.diff(after.qconfig).items()),
        len({*before.qconfig.ops, *after.qconfig.ops}),
        tuple(differ),
        tuple(notes),
    )


def _noise(before: Side, after: Side) -> Noise:
    """Return the noise of the difference of the task's metrics."""
    values = [next((v for k, v in s.metrics.items() if _of_task(k)), math.nan) for s in (before, after)]
    if before.manifest.get("data") != after.manifest.get("data"):
        return Noise(math.inf, "not known: they were evaluated on other data")
    if before.stopped or after.stopped:
        return Noise(math.inf, "not known: an evaluation ended early")
    samples = before.manifest.get("eval_samples", 0)
    pairs, sequences = (before.scores, after.scores), before.manifest.get(SEQUENCES, ())
    return difference_noise(values[0], values[1], samples, pairs, sequences)


def _metric(name: str, before: Side, after: Side, noise: Noise) -> MetricChange:
    a, b = before.metrics.get(name), after.metrics.get(name)
    if not name.startswith("accuracy/"):
        return MetricChange(name, a, b)
    return MetricChange(name, a, b, SURE * noise.error if noise.known else None, noise.how)


def _of_task(name: str) -> bool:
    """True for the task's metric, of which accuracy/drop is the loss against float."""
    return name.startswith("accuracy/") and name != "accuracy/drop"


def _bpu(before: Side, after: Side) -> Change | None:
    """BPU time over that of `before`: equal operators at their likely time, the others at all low, likely or high."""
    fixed = before.metrics.get("cost/bpu_ms", 0.0) - sum(row[2] for row in before.times.values())
    same = [name for name, row in before.times.items() if row == after.times[name]]
    common = max(fixed, 0.0) + sum(before.times[name][2] for name in same)
    differing = [name for name in before.times if name not in set(same)]
    rows = [[side.times[name][1:] for name in differing] for side in (before, after)]
    sums = [[common + sum(row[bound] for row in of_side) for bound in range(3)] for of_side in rows]
    if min(sums[0]) <= 0.0:
        return None
    ratios = [b / a for a, b in zip(*sums, strict=True)]
    return Change(ratios[1], min(ratios), max(ratios))


def _operator(name: str, pair: tuple[OpQConfig | None, OpQConfig | None], before: Side, after: Side) -> OperatorChange:
    scores = before.sensitivities or after.sensitivities
    finite = [score for score in scores.values() if math.isfinite(score)]
    score = scores.get(name)
    known = score is not None and math.isfinite(score) and sum(finite) > 0
    share = score / sum(finite) if known and score is not None else None
    old_ms, new_ms = (side.times[name][2] if name in side.times else None for side in (before, after))
    old, new = map(_precision, pair)
    added_us = 1e3 * (new_ms - old_ms) if old_ms is not None and new_ms is not None else 0.0
    return OperatorChange(name, old, new, score, share, old_ms, new_ms, _gain(pair, share, added_us))


def _precision(op: OpQConfig | None) -> str:
    """`qint8/qint16` (output/weight) and what else is set; `-` for an operator that is not there."""
    if op is None:
        return "-"
    dtypes, *more = f"{op.output or 'int32'}{f'/{op.weight}' if op.weight else ''}", *op.effective[2:]
    odd = [f"{value:g}" if isinstance(value, float) else str(value) for value in more if value is not None]
    return " ".join([dtypes, *odd])


def _gain(pair: tuple[OpQConfig | None, OpQConfig | None], share: float | None, added_us: float) -> str:
    """Return what the second form of an operator gains or loses against the first, in words."""
    a, b = pair
    if a is None or b is None:
        return "only in one of the models"
    found = []
    raised = (b.output.rank if b.output else 9) - (a.output.rank if a.output else 9)
    if raised and share is not None:
        found.append(f"{'removes' if raised > 0 else 'adds'} {share:.1%} of the int8 sensitivity")
    if added_us:
        found.append(f"{'costs' if added_us > 0 else 'saves'} {abs(added_us):.3g} us")
    return ", ".join(found) or ("not ranked" if raised else "another scale or rule")
