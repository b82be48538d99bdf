"""The bench: what all trials of a study share, computed once, and one trial as a plain function of its settings.

Tracing, statistics of one calibration amount, bad cases, sensitivities and evaluated qconfigs do not depend on
most of what a trial varies. They are kept here under the settings they depend on; a trial pays for what is new
in it, and a hit gives the same numbers as a miss.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

from qflow.analysis.badcase import find_badcases
from qflow.analysis.badcase_files import BadcaseInputs
from qflow.analysis.calibration_check import calibration_findings
from qflow.analysis.candidates import Candidate, candidates
from qflow.analysis.model_check import check_model
from qflow.analysis.sensitivity import sensitivity
from qflow.analysis.tables import BadcaseTable, Finding, SensitivityTable
from qflow.core.device import DeviceRules, apply_rules
from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError, DataError, ModelError
from qflow.core.graph import ModelGraph
from qflow.core.qconfig import QConfig
from qflow.core.record import digest
from qflow.core.sensitive import table_rows
from qflow.core.setter import HighPrecisionOutput, TemplateSetter, ratio_candidates, resolve
from qflow.core.settings import CalibrationSettings, QConfigSettings, SensitivitySettings, TrialSettings
from qflow.core.template import trial_setters
from qflow.cost.latency import Pricer
from qflow.cost.measured import measure
from qflow.cost.model import CostModel
from qflow.cost.records import CostReport
from qflow.quant.calibrate import CalibrationStats, apply_scales, collect
from qflow.quant.prepare import prepare
from qflow.quant.quantized_model import QuantizedModel, scales
from qflow.quant.retrace import graph_at
from qflow.tasks.task import Task, batches, deploy_inputs, evaluate, model_inputs
from qflow.training import Training, float_weights, train_trial
from qflow.trial import TrialResult

Progress = Callable[[int], None]


FREE_MS = 1e-5  # a promotion that costs less is free: by sensitivity alone among its like


def silent(_: int) -> None:
    """Progress that nobody looks at."""


@dataclass
class Bench:
    """One task on one device. Stages fill it in order; each is computed once."""

    task: Task
    rules: DeviceRules
    cost_model: CostModel
    sensitivity_settings: SensitivitySettings = field(default_factory=SensitivitySettings)
    default_calibration: CalibrationSettings = field(default_factory=CalibrationSettings)
    float_metric: float = float("nan")
    skip: tuple[str, ...] = ()
    """Modules or classes that stay in float."""
    training: Training | None = None
    """Loss, optimizer and scheduler for trials with QAT."""
    eval_samples: int = 0
    eval_batch: int = 32
    hits: int = 0
    profile: str | None = None
    """A measured report of this model at the deployed shape."""
    profile_dtype: QDtype = QDtype.qint8
    """Template that it was built with."""
    unmatched: tuple[str, ...] = ()
    """What the report and the model do not share: layers without an operator, operators without a layer."""

    def __post_init__(self) -> None:
        self._stats: dict[tuple[int, int, int], CalibrationStats] = {}
        self._done: dict[str, TrialResult] = {}
        self._prepared: QuantizedModel | None = None
        self._deploy: ModelGraph | None = None
        self.sensitivities: SensitivityTable | None = None
        self.badcases: BadcaseTable | None = None

    # ---- stages

    def measure_float(self, progress: Progress = silent) -> float:
        """Metric of the float model. Raises ConfigError if the task states another one."""
        metric, self.eval_samples = evaluate(self.task, self.task.model, self.eval_batch, progress)
        stated = self.task.stated_metric
        if stated is not None and abs(metric - stated) > self.task.tolerance:
            raise ConfigError(
                f"The float model reaches the metric its task states ({stated:g} within {self.task.tolerance:g}), but "
                f"got {metric:.4f} on {self.eval_samples} samples. Check weights and data, or set task.float_metric."
            )
        self.float_metric = metric
        return metric

    def prepare(self) -> QuantizedModel:
        """Trace on the first evaluation batch, prove the float graph, and trace again at the deployed shape."""
        batch, _ = next(batches(self.task, "evaluation", min(self.eval_batch, 4), limit=1))
        example = model_inputs(self.task, batch)
        self._prepared = prepare(self.task.model, example, self.skip)
        way_out = f"Give the shape it is deployed at: task.deploy_shape is {self.task.deploy_shape}."
        self._deploy = graph_at(self._prepared, deploy_inputs(self.task, example), way_out)
        return self._prepared

    @property
    def prepared(self) -> QuantizedModel:
        """The prepared model."""
        if self._prepared is None:
            self.prepare()
        assert self._prepared is not None
        return self._prepared

    @property
    def graph(self) -> ModelGraph:
        """The fused graph at the evaluated shape."""
        return self.prepared.graph

    @property
    def deploy_graph(self) -> ModelGraph:
        """The same graph at the deployed shape, for cost."""
        assert self.prepared is not None
        assert self._deploy is not None
        return self._deploy

    def calibrate(self, settings: CalibrationSettings, progress: Progress = silent) -> CalibrationStats:
        """Statistics of `steps` batches of `batch_size`: one pass serves all methods and dtypes.

        Raises DataError if the calibration set holds fewer samples.
        """
        key = (settings.batch_size, settings.steps, settings.sampling)
        if key not in self._stats:
            self.require_samples(settings.batch_size, settings.steps)
            stream = batches(self.task, "calibration", settings.batch_size, settings.steps)
            self._stats[key] = collect(
                self.prepared, ((model_inputs(self.task, b), size) for b, size in stream), progress, settings.sampling
            )
        return self._stats[key]

    def require_samples(self, batch_size: int, steps: int) -> None:
        """Refuse calibration amounts that the data cannot give. Raises DataError."""
        available, wanted = len(self.task.data.calibration), batch_size * steps
        if 0 < available < wanted:
            raise DataError(
                f"Calibration takes batch_size x steps = {wanted} samples, but got {available} in "
                f"task.data.calibration. Lower calibration.batch_size or calibration.steps, or their search."
            )

    def peek(self) -> None:
        """Read one batch of each split, so that data that cannot work are refused before anything long runs."""
        for split in ("calibration", "evaluation"):
            for _ in batches(self.task, split, self.default_calibration.batch_size, limit=1):
                pass

    def find_badcases(
        self, progress: Progress = silent, inputs: BadcaseInputs | None = None, template: QDtype = QDtype.qint8
    ) -> BadcaseTable:
        """The calibration samples on which the model, all at `template`, differs most from float; progress in steps.

        `inputs` keeps the model inputs of the chosen samples.
        """
        chosen, calibration = self.sensitivity_settings, self.default_calibration
        self.all(template)
        stream = batches(self.task, "calibration", calibration.batch_size, self.badcase_steps)
        self.badcases = find_badcases(
            self.task.model,
            self.prepared,
            ((model_inputs(self.task, b), n) for b, n in stream),
            metric=chosen.metric,
            count=chosen.bad_cases,
            on_step=progress,
            inputs=inputs,
        )
        return self.badcases

    @property
    def badcase_steps(self) -> int:
        """Batches that are searched for bad cases."""
        return -(-self.sensitivity_settings.search_samples // self.default_calibration.batch_size)

    def all(self, dtype: QDtype) -> list[str]:
        """Set every operator to `dtype` under the default calibration; returns what calibration noticed."""
        calibration = self.default_calibration
        return apply_scales(self.prepared, self.calibrate(calibration), self.template(dtype)[1], calibration)

    def cases(self) -> list[Any]:
        """Model inputs of the bad cases, as one batch."""
        worst = (self.badcases or self.find_badcases()).chosen
        return [model_inputs(self.task, b) for b, _ in batches(self.task, "calibration", len(worst), indices=worst)]

    @property
    def quantizers(self) -> int:
        """Number of int8 rows of a sensitivity table: outputs and weights, high-precision outputs apart."""
        return len(self.graph.quantized) - len(self.graph.high_precision) + len(self.graph.weighted)

    def rank(self, progress: Progress = silent, template: QDtype = QDtype.qint8) -> SensitivityTable:
        """Sensitivity of every quantizer on the bad cases; `progress` counts rows.

        At each of `sensitivity.dtypes`; with another template than qint8 at what that gives each quantizer.
        """
        cases, settings = self.cases(), self.sensitivity_settings
        rows: list[Candidate] = []
        wanted = [QDtype.parse(name, "sensitivity.dtypes") for name in settings.dtypes]
        for dtype in wanted if template == QDtype.qint8 else []:
            self.all(QDtype.qint8 if dtype == QDtype.float16 else dtype)
            rows += candidates(self.prepared, dtype)
        self.all(template)
        rows = rows or candidates(self.prepared)
        self.sensitivities = sensitivity(
            self.task.model, self.prepared, cases, settings=settings, rows=rows, on_row=progress
        )
        return self.sensitivities

    # ---- qconfigs

    def template(self, dtype: QDtype) -> tuple[QConfig, QConfig]:
        """(requested, applied) with every operator at `dtype`."""
        requested = resolve(self.graph, [HighPrecisionOutput(), TemplateSetter(dtype)], self.rules.march)
        return requested, apply_rules(self.graph, requested, self.rules, self.scores)

    @property
    def promotable(self) -> tuple[str, ...]:
        """Operators that keep int16 on the device: what an int16 ratio counts."""
        return ratio_candidates(self.graph, self.template(QDtype.qint16)[1])

    @property
    def scores(self) -> dict[str, float]:
        """Activation sensitivities by operator; empty before the ranking."""
        return self.sensitivities.activation_scores() if self.sensitivities else {}

    @property
    def worth(self) -> dict[str, float]:
        """Sensitivity of each promotable operator by the time that int16 costs there, one promoted in all-int8."""
        costs = self.pricer.promotions(self.template(QDtype.qint8)[1])
        return {name: self.scores.get(name, 0.0) / max(costs[name], FREE_MS) for name in self.promotable}

    def resolve(self, settings: QConfigSettings) -> tuple[QConfig, QConfig]:
        """(requested, applied) qconfig of a trial. A ratio between 0 and 1 needs sensitivities."""
        scores = self.scores
        if 0.0 < settings.int16_ratio < 1.0 and not scores:
            raise ConfigError("An int16 ratio between 0 and 1 needs sensitivities, but got none. Rank first.")
        rows = table_rows(self.sensitivities) if self.sensitivities else ()
        ranked = self.worth if settings.ranking == "score_per_ms" and settings.int16_ratio > 0.0 else scores
        setters = trial_setters(settings, self.promotable, ranked, rows)
        requested = resolve(self.graph, setters, self.rules.march, propagate=settings.propagate_ranges)
        return requested, self._explained(apply_rules(self.graph, requested, self.rules, scores))

    def _explained(self, applied: QConfig) -> QConfig:
        """The same qconfig; operators that the ratio passed over because the device bars int16 say so."""
        barred = {name: op.fallback for name, op in self.template(QDtype.qint16)[1].ops.items() if op.fallback}
        return applied.with_ops(
            {
                name: replace(applied.ops[name], fallback=f"no int16: {reason}")
                for name, reason in barred.items()
                if applied.ops[name].output == QDtype.qint8 and not applied.ops[name].fallback
            }
        )

    def cost(self, qconfig: QConfig) -> CostReport:
        """Predicted cost at the deployed shape."""
        return self.pricer.report(qconfig)

    @cached_property
    def pricer(self) -> Pricer:
        """The cost model on the deployed graph, with the measured profile where there is one.

        Raises ConfigError for a profile that cannot be read or that names none of the model's operators.
        """
        if self.profile is None:
            return Pricer(self.deploy_graph, self.cost_model)
        measured, self.unmatched = measure(self.profile, self.deploy_graph, self.template(self.profile_dtype)[1])
        return Pricer(self.deploy_graph, self.cost_model, measured)

    # ---- trials

    def run_trial(self, settings: TrialSettings, progress: Progress = silent) -> TrialResult:
        """Resolve, calibrate, evaluate and cost one trial. Equal (qconfig, calibration) are run once."""
        requested, applied = self.resolve(settings.qconfig)
        return self.run_qconfig(requested, applied, settings, progress)

    def run_qconfig(
        self, requested: QConfig, applied: QConfig, settings: TrialSettings, progress: Progress = silent
    ) -> TrialResult:
        """Evaluate a qconfig that is already resolved, after QAT if the settings ask for steps."""
        calibration, qat = settings.calibration, settings.qat
        stats = self.calibrate(calibration)
        findings = apply_scales(self.prepared, stats, applied, calibration)
        # What changes numbers is in the dtypes and the scales: settings that lead to the same ones are one trial.
        key = digest({"qconfig": applied.digest, "scales": scales(self.prepared), "qat": qat if qat.steps else None})
        if key in self._done:
            self.hits += 1
            return replace(self._done[key], requested=requested, qconfig=applied, shared=True)
        model, report = self.prepared, None
        if qat.steps:
            model, report = train_trial(self.task, self.prepared, self.training, qat, applied, calibration)
        with model.quantized():
            metric, samples = evaluate(self.task, model, self.eval_batch, progress)
            self._require_all_ran(model)
        found = calibration_findings(model, stats, applied, findings)
        found += tuple(
            Finding(name, "check", f"{count} values beyond half precision: calibration.float16_clip=true, or qint16")
            for name, count in model.overflowed.items()
        )
        found += tuple(Finding("qat", "check", text) for text in (report.findings if report else ()))
        result = TrialResult(
            metric=metric,
            drop=self.task.drop(self.float_metric, metric),
            samples=samples,
            qconfig=applied,
            requested=requested,
            cost=self.cost(applied),
            check=check_model(self.graph, requested, applied, found, calibration.method),
            scales=scales(model),
            calibration_samples=stats.samples,
            shared=False,
            training=report,
            weights=float_weights(model) if qat.steps else None,
        )
        self._done[key] = result
        return result

    def _require_all_ran(self, model: QuantizedModel) -> None:
        """What was asked must have been computed: a quantizer that never ran would flatter the metric."""
        quantizers = [*model.outputs.values(), *model.weights.values()]
        wanted = {q.name for q in quantizers if q.dtype not in (None, QDtype.float32)}
        missing = sorted(wanted - model.ran)
        if missing or model.unseen:
            raise ModelError(
                f"Every planned quantizer runs, but got none for {missing[:3]} and unplanned operators "
                f"{sorted(model.unseen)[:3]}. The model takes another path on this data than while traced."
            )
