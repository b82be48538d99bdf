"""The health of a study: checks of whether its result can be relied on, each with a verdict in words.

A check is a function of the searched study. It answers fine, look (something to change, with what) or unknown.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from qflow.search.domain import Choice, Interval, Scalar, Space
from qflow.search.importance import FANOVA, Importances
from qflow.search.noise import SIGMAS, Margin, Noise, difference_noise
from qflow.search.objective import CONSTRAINT, Goal, accurate, best_trial, meets, merit, nearest_miss, over_budget
from qflow.search.outcome import FailedTrial, FinishedTrial

FINE, LOOK, UNKNOWN = "fine", "look", "unknown"
NO_INFLUENCE = 0.01  # share of the variance of every metric below which a parameter has no influence
EDGE = 0.02  # share of an interval (of its logarithms with log) next to its end that counts as the border
FEW_STEPS, FEW_SAMPLES = 10, 50  # the guide recommends 10 to 100 steps of calibration
MANY_FAILURES = 0.2  # share of trials


@dataclass(frozen=True)
class Searched:
    """What the checks look at: the trials of a study, its space and its goal."""

    space: Space
    goal: Goal
    trials: Sequence[FinishedTrial]
    """Those of the search, by number."""
    failed: Sequence[FailedTrial]
    baselines: Mapping[str, FinishedTrial]
    accuracy: str
    """Name of the task's metric on a run."""
    float_metric: float
    samples: int
    """Number of evaluation samples."""
    by_hand: Sequence[FinishedTrial] = ()
    """Trials by hand, which are no result of the search."""
    sequences: Sequence[int] = ()
    """Lengths of the sequences that the evaluation samples are frames of; empty if samples are independent."""
    calibration: tuple[int, int] = (0, 0)
    """(steps, samples) of the calibration; zeros if they are not known."""
    importances: Importances = field(default_factory=lambda: Importances({}, "They were not computed."))
    scores: Callable[[FinishedTrial | None], Sequence[float]] = lambda trial: ()
    """Returns the score of a trial, or of the float model (None), for each evaluation sample; empty if not kept."""

    @property
    def whole(self) -> list[FinishedTrial]:
        """The trials that were evaluated to the end; what ended early has no drop of its own."""
        return [t for t in self.trials if not t.stopped]

    @property
    def best(self) -> FinishedTrial | None:
        """The best trial that meets the goal."""
        return best_trial(self.whole, self.goal.ranking)

    @property
    def shown(self) -> FinishedTrial | None:
        """The best trial, or the nearest miss."""
        return self.best or nearest_miss(self.trials, self.goal.ranking)

    @property
    def rival(self) -> FinishedTrial | None:
        """The trial that would be better than the shown one if it met the goal, and misses it by the least."""
        best = self.shown
        order = [merit(t, self.goal.ranking) for t in self.whole if best is not None and t.number == best.number]
        cheaper = [t for t in self.whole if order and merit(t, self.goal.ranking) < order[0] and not over_budget(t)]
        return min(cheaper, key=lambda t: t.outcome.constraints[CONSTRAINT], default=None)

    def noise(self, one: FinishedTrial, other: FinishedTrial | None) -> Noise:
        """Noise of the difference of two trials, or of a trial to the float model (None)."""
        scores = self.scores(one), self.scores(other)
        reference = self.float_metric if other is None else other.outcome.metrics[self.accuracy]
        return difference_noise(one.outcome.metrics[self.accuracy], reference, self.samples, scores, self.sequences)


@dataclass(frozen=True)
class Verdict:
    """The answer of one check: what was checked, `fine`, `look` or `unknown`, and a sentence."""

    title: str
    state: str
    text: str


def border(study: Searched) -> Verdict:
    """Whether the best trial lies on the border of an interval or range: a better one may lie beyond."""
    title, best = "Border of the space", study.shown
    if best is None:
        return Verdict(title, UNKNOWN, "No trial finished.")
    ends = [text for key, value in best.params.items() if (text := _at_end(study.space, key, value))]
    if ends:
        words = f"Trial {best.number} lies at the end of {', '.join(ends)}: a better value may lie beyond it."
        return Verdict(title, LOOK, f"{words} Widen that key unless its end is natural.")
    return Verdict(title, FINE, f"Trial {best.number} lies inside of every searched interval.")


def _at_end(space: Space, key: str, value: Scalar) -> str:
    domain = space.get(key)
    if domain is None or isinstance(domain, Choice) or not isinstance(value, (int, float)) or isinstance(value, bool):
        return ""
    if isinstance(domain, Interval):
        low, high, place = domain.low, domain.high, math.log if domain.log else float
        inside = place(min(max(value, low), high))
        at = (inside - place(low)) / (place(high) - place(low)) if high > low else 0.5
        at_low, at_high = at <= EDGE, at >= 1.0 - EDGE
    else:
        numbers = [float(p) for p in domain.points() if isinstance(p, (int, float))]
        low, high = numbers[0], numbers[-1]
        at_low, at_high = value <= low, value >= high
    if key == "qconfig.int16_ratio" and value in (0.0, 1.0):
        return ""  # nothing lies beyond none and all operators
    if high > low and at_low:
        return f"{key} (its least value {low:g})"
    return f"{key} (its largest value {high:g})" if high > low and at_high else ""


def beats_baselines(study: Searched) -> Verdict:
    """Whether the search found something better than the baselines."""
    title, best = "Better than the baselines", study.best
    if not study.baselines:
        return Verdict(title, UNKNOWN, "No baseline was measured.")
    if best is None:
        return Verdict(title, LOOK, "No trial meets the goal, so none is better than a baseline that does.")
    numbers = {trial.number: label for label, trial in study.baselines.items()}
    rivals = [t for t in study.baselines.values() if meets(t)]
    if best.number in numbers:
        return Verdict(title, LOOK, f"The best trial is the baseline {numbers[best.number]}: no mix is better.")
    if not rivals:
        return Verdict(title, FINE, "No baseline meets the goal, and the best mix does.")
    rival = min(rivals, key=lambda t: merit(t, study.goal.ranking))
    name = next(iter(study.goal.ranking), study.accuracy)
    ours, theirs = best.outcome.metrics.get(name), rival.outcome.metrics.get(name)
    if ours is None or theirs is None:
        return Verdict(title, UNKNOWN, f"{name} was not measured.")
    return Verdict(title, FINE, f"{name} {ours:.4g}, against {theirs:.4g} of {numbers[rival.number]}.")


def feasible(study: Searched) -> Verdict:
    """Whether a trial meets the goal, and if not, which part of it is out of reach."""
    title = "Goal within reach"
    if not study.trials:
        return Verdict(title, UNKNOWN, "No trial finished.")
    if study.best is not None:
        count = sum(map(meets, study.trials))
        return Verdict(title, FINE, f"{count} of {len(study.trials)} trials meet it ({study.goal}).")
    enough = [t for t in study.whole if accurate(t)]
    if enough:
        budgets = sorted({name for t in enough for name in over_budget(t)})
        return Verdict(title, LOOK, f"Trials keep the accuracy, but none stays below {', '.join(budgets)}. Relax it.")
    finest = study.baselines.get("all-int16")
    if finest is not None:
        drop = finest.outcome.metrics["accuracy/drop"]
        words = f"All-int16 itself loses {drop:.4g}, and {study.goal.max_drop:g} is allowed"
        return Verdict(
            title, LOOK, f"{words}: no int8/int16 mix is likely to meet it. See the decisions for the cause."
        )
    least = min(t.outcome.metrics["accuracy/drop"] for t in study.whole or study.trials)
    return Verdict(title, LOOK, f"The least drop is {least:.4g}, and {study.goal.max_drop:g} is allowed.")


def influence(study: Searched) -> Verdict:
    """Whether every searched parameter has an influence: one without makes the search slower for nothing."""
    title, found = "Parameters with influence", study.importances
    shares = [share for (evaluator, _), share in found.shares.items() if evaluator == FANOVA]
    if not shares:
        return Verdict(title, UNKNOWN, found.reason or "They were not computed.")
    idle = [key for key in found.keys if all(share.get(key, 0.0) < NO_INFLUENCE for share in shares)]
    if idle:
        words = f"{', '.join(idle)} explain{'s' * (len(idle) == 1)} less than {NO_INFLUENCE:.0%} of every metric"
        return Verdict(title, LOOK, f"{words}. Fix {'it' if len(idle) == 1 else 'them'} in the next study.")
    return Verdict(title, FINE, f"Each of the {len(found.keys)} parameters explains {NO_INFLUENCE:.0%} or more.")


def resolution(study: Searched) -> Verdict:
    """Whether the differences that decide are larger than their noise (two standard errors).

    They are the distance of the shown trial from the goal, and from the cheaper trial that misses it by the least.
    """
    title, best, rival = "Larger than the noise", study.shown, study.rival
    if best is None:
        return Verdict(title, UNKNOWN, "No trial finished.")
    noise = study.noise(best, None)
    if not noise.known:
        return Verdict(title, UNKNOWN, f"The noise is {noise.how}.")
    drop = best.outcome.metrics["accuracy/drop"]
    gaps = [(f"Trial {best.number} is {{:.4g}} from the goal", Margin(study.goal.max_drop - drop, noise))]
    if rival is not None and study.best is not None:
        words = f"the cheaper trial {rival.number}, which misses it, loses {{:.4g}} more"
        gaps.append((words, Margin(rival.outcome.metrics["accuracy/drop"] - drop, study.noise(rival, best))))
    texts = [
        f"{words.format(abs(gap.distance))} (two standard errors: {SIGMAS * gap.noise.error:.4g})"
        for words, gap in gaps
    ]
    small = [text for text, (_, gap) in zip(texts, gaps, strict=True) if not gap.sure]
    among = f" in {len(study.sequences)} sequences" if study.sequences else ""
    how = f"The noise is {noise.how}, over {study.samples} samples{among}."
    if small:
        return Verdict(title, LOOK, f"{'; '.join(texts)}. More evaluation samples would make it sure. {how}")
    return Verdict(title, FINE, f"{'; '.join(texts)}. {how}")


def calibrated(study: Searched) -> Verdict:
    """Whether the calibration had enough steps and samples."""
    title, (steps, samples) = "Calibration data", study.calibration
    if not samples:
        return Verdict(title, UNKNOWN, "The number of calibration samples is not recorded.")
    found = f"{samples} samples in {steps} steps"
    if samples < FEW_SAMPLES:
        return Verdict(title, LOOK, f"{found}: fewer than {FEW_SAMPLES} samples say little of ranges. Give more data.")
    if steps < FEW_STEPS:
        words = f"{found}, and the guide asks for {FEW_STEPS} to 100 steps"
        return Verdict(title, LOOK, f"{words}: give more data, or a smaller calibration.batch_size.")
    return Verdict(title, FINE, f"{found}.")


def failures(study: Searched) -> Verdict:
    """Whether trials failed, and why."""
    title, count = "Failures", len(study.failed)
    if not count:
        return Verdict(title, FINE, "No trial failed.")
    reasons = dict.fromkeys(trial.reason for trial in study.failed)
    first = f"{count} of {count + len(study.trials)} trials failed: {next(iter(reasons))}"
    more = f" ({len(reasons) - 1} more reasons below)" if len(reasons) > 1 else ""
    many = count > MANY_FAILURES * (count + len(study.trials))
    return Verdict(title, LOOK if many else FINE, first + more)


CHECKS: tuple[Callable[[Searched], Verdict], ...] = (
    feasible, beats_baselines, resolution, border, influence, calibrated, failures,
)  # fmt: skip


def health(study: Searched) -> list[Verdict]:
    """Return the verdict of every check."""
    return [check(study) for check in CHECKS]
