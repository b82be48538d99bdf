"""The evaluator: it runs one trial as a function of its settings, on the state that all trials share (analysed.py).

A qconfig with scales that was evaluated before is not evaluated again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

from qflow.analysis.checks.model_check import check_model
from qflow.analysis.measures.tables import Finding
from qflow.core.dtype import QDtype
from qflow.core.errors import BrokenMixError, NotFiniteError
from qflow.core.qconfig import QConfig
from qflow.core.raisable import raisable
from qflow.core.record import digest
from qflow.core.settings import TrialSettings
from qflow.quant.model.model_state import stored_quantizers
from qflow.quant.model.quantized_model import scales
from qflow.tasks.identity import Identity, of_training
from qflow.tasks.task import split_for
from qflow.trial.analysed import AnalysedState
from qflow.trial.engine import Engine, OwnEngine, Quantized
from qflow.trial.frames import evaluate_from_start
from qflow.trial.record import Evaluation, TrialResult
from qflow.trial.shared import Progress, silent
from qflow.trial.training import Training, float_weights, train_trial, training_key


@dataclass
class Evaluator(AnalysedState):
    """One task on one device, with the results of its trials."""

    engine: Engine = field(default_factory=OwnEngine)
    """Who quantizes the models of trials; everything else of a study is qflow's own."""
    training: Training | None = None
    """Loss, optimizer and scheduler for trials with QAT."""
    hits: int = 0
    """Number of trials whose metric was known, so that nothing was evaluated for them."""
    evaluations: int = 0
    """Number of evaluations that ran."""
    least: float | None = None
    """An evaluation may end early once its metric cannot reach this value; None evaluates every sample."""
    checkpoints: Path | None = None
    """Folder of training checkpoints, from which a longer training continues; None trains from the start."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._trained: dict[str, TrialResult] = {}
        self._trainings: dict[str, Identity] = {}

    def keep_in(self, folder: Path, say: Callable[[str], None]) -> None:
        """Keep results, checkpoints of trainings and long searches in `folder`; `say` takes lines on what is not."""
        self.cache.folder, self.cache.say = folder, say
        self.checkpoints, self.searches = folder / "training", folder / "searches"

    def run_trial(self, settings: TrialSettings, progress: Progress = silent) -> TrialResult:
        """Resolve, calibrate and evaluate one trial and predict its cost. Equal trials run once."""
        with self.repaired(settings.repair, settings.calibration):
            requested, applied = self.resolve(settings.qconfig)
            return self.run_qconfig(requested, applied, settings, progress)

    def run_qconfig(
        self, requested: QConfig, applied: QConfig, settings: TrialSettings, progress: Progress = silent
    ) -> TrialResult:
        """Evaluate a qconfig that is already resolved, with repaired weights, after QAT if `settings` say so."""
        with self.repaired(settings.repair, settings.calibration):
            return self._run(requested, applied, settings, progress)

    def _run(self, requested: QConfig, applied: QConfig, settings: TrialSettings, progress: Progress) -> TrialResult:
        calibration, qat, ran = settings.calibration, settings.qat, self.evaluations
        self.engine.check(self, settings)
        made, report = self.engine.quantize(self, requested, applied, calibration), None
        applied = made.qconfig
        # Only dtypes, scales and switches change numbers: settings that lead to the same ones are the same trial.
        key = digest(self.key(applied.digest, made.state, self.eval_batch))
        if qat.steps:
            training = self.key(training_key(self.prepared, self.training, qat, applied, calibration))
            key = digest([key, self.least, qat.steps, training])
            if (known := self._trained.get(key)) is not None:
                self.hits += 1
                return replace(
                    known, requested=requested, qconfig=applied, calibration_samples=made.samples, evaluated=False
                )
        if qat.steps:
            place = self.training_folder(split_for(self.task, "train", qat.augment))
            given, floats = (self.training, qat, applied, calibration, place), self.weights.model
            made, report = made.trained(lambda model: train_trial(self.task, model, *given, floats))
            found = self._evaluated(made, progress)
        else:
            found = self._evaluation(key, made, progress)
        self.hits += self.evaluations == ran
        findings = made.findings(found.overflowed)
        findings += tuple(Finding("qat", "check", text) for text in (report.findings if report else ()))
        cost, model = self.cost(applied), made.model
        result = TrialResult(
            metric=found.metric,
            drop=self.task.drop(self.float_metric, found.metric),
            samples=found.samples,
            qconfig=applied,
            requested=requested,
            cost=cost,
            slowdown=self.precisions.slowdown(cost.latency_ms),
            check=check_model(self.graph, requested, applied, findings, calibration.method),
            scales=scales(model),
            quantizers=stored_quantizers(model),
            calibration_samples=made.samples,
            evaluated=self.evaluations > ran,
            scores=found.scores,
            details=found.details,
            training=report,
            repair=self.weights.now.table if self.weights.now else None,
            weights=float_weights(model) if qat.steps or self.weights.digest else None,
            calls=made.calls,
        )
        if qat.steps:
            self._trained[key] = result
        return result

    def _evaluation(self, key: str, made: Quantized, progress: Progress) -> Evaluation:
        """Return the evaluation of the calibrated model: a full one if known, else one that ended early for `least`."""
        for known in [key] if self.least is None else [key, [key, self.least]]:
            if (found := self.cache.known("evaluation", known, Evaluation)) is not None:
                return found
        found = self._evaluated(made, progress)
        stopped = found.samples < self.eval_samples
        return self.cache.keep("evaluation", [key, self.least] if stopped else key, found)

    def _evaluated(self, made: Quantized, progress: Progress) -> Evaluation:
        """Evaluate the model of an engine: the metric, the number of samples, and the overflowed values by operator.

        Raises BrokenMixError if an output is not finite.
        """
        self.evaluations += 1
        with made.running() as model:
            try:
                found = evaluate_from_start(self.task, model, self.eval_batch, progress, self.least)
            except NotFiniteError:
                raise BrokenMixError(self._broken(made.qconfig)) from None
        return replace(found, overflowed=made.overflowed)

    def _broken(self, applied: QConfig) -> str:
        """Return why outputs that are not finite fail a trial, with the operators that alone cause it at int8."""
        alone = [name for name in applied.names(QDtype.qint8) if math.isinf(self.scores.get(name, 0.0))]
        raised = raisable(self.graph, self.rules, alone)
        way = "give it int16 (qconfig.modules)" if raised else "the device keeps it there: give it a known range"
        cause = f"Already alone at int8, {', '.join(alone)} has this effect: {way}."
        finer = (
            "Give more operators int16." if applied.names(QDtype.qint8) else "Give operators fp16, or a known range."
        )
        return "A mix gives finite outputs where float does, but got NaN or inf. " + (cause if alone else finer)

    def training_folder(self, split: str) -> Path | None:
        """Return the folder of the checkpoints for this task, loss, optimizer and training split, or None."""
        if self.checkpoints is None or self.identity.unidentified:
            return None
        if split not in self._trainings:
            self._trainings[split] = of_training(self.task, self.training, split)
            for part in self._trainings[split].unidentified[:1]:
                self.cache.say(f"{'training':<12} keeps no checkpoints: {part} cannot be recognised at the next start")
        found = self._trainings[split]
        return None if found.unidentified else self.checkpoints / digest(self.key(self.identity.content, found.content))
