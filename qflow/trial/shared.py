"""The state that all trials of a study share: float metric, traced model, float weights, statistics, qconfigs, cost.

Each part is computed once and cached by content; a cache hit gives the same numbers as a computation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from qflow.analysis.measures.tables import SensitivityTable
from qflow.core.device_rules import DeviceRules
from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError
from qflow.core.graph import ModelGraph
from qflow.core.qconfig import QConfig
from qflow.core.repair_settings import RepairSettings
from qflow.core.settings import CalibrationSettings, QConfigSettings
from qflow.cost_model.latency import Pricer
from qflow.cost_model.measured import measure
from qflow.cost_model.model import CostModel
from qflow.cost_model.records import CostReport
from qflow.quant.model.calibrate import CalibrationStats, apply_scales, collect
from qflow.quant.model.graph_at_shape import graph_at
from qflow.quant.model.prepare import prepare
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.tasks.deployed import deploy_inputs
from qflow.tasks.identity import Identity, of_task, split_digest
from qflow.tasks.loading import seeded
from qflow.tasks.task import Task, batches, model_inputs, split_for
from qflow.trial.cache import Cache
from qflow.trial.frames import beginning, evaluate_from_start, steps_of
from qflow.trial.precisions import Precisions
from qflow.trial.record import Evaluation, detail_metrics
from qflow.trial.repaired import FloatWeights, Repaired, repaired

Progress = Callable[[int], None]


def silent(_: int) -> None:
    """Progress that is not shown."""


@dataclass
class SharedState:
    """One task on one device. The stages fill it in order; each part is computed once."""

    task: Task
    rules: DeviceRules
    cost_model: CostModel | str  # a text says why the device has none; then nothing can be priced
    default_calibration: CalibrationSettings = field(default_factory=CalibrationSettings)
    default_repair: RepairSettings = field(default_factory=RepairSettings)
    float_metric: float = float("nan")
    skip: tuple[str, ...] = ()
    """Modules or classes that stay in float."""
    fold_functional_norms: bool = False
    """`F.batch_norm` on a module's own statistics is folded as an nn.BatchNorm2d is."""
    split_shared: tuple[str, ...] = ()
    """Modules whose calls get a quantizer each (quant/model/shared_modules.py)."""
    eval_samples: int = 0
    eval_batch: int = 32
    cache: Cache = field(default_factory=Cache)
    """Holds what this start or an earlier one computed from the same content."""
    profile: str | None = None
    """Path of a measured report of this model at the deployed shape."""
    profile_dtype: QDtype = QDtype.qint8
    """Template of the qconfig that the report was measured with."""
    unmatched: tuple[str, ...] = ()
    """Layers of the report without an operator of the model, and operators without a layer."""

    def __post_init__(self) -> None:
        self._precisions: Precisions | None = None
        self._prepared: QuantizedModel | None = None
        self.example: Any = None  # the model inputs that the model is traced on
        self._deploy: ModelGraph | None = None
        self._weights: FloatWeights | None = None
        self.present_repair = RepairSettings()
        """The settings of the repair whose weights the prepared model has."""
        self.sensitivities: SensitivityTable | None = None
        self.float_scores: tuple[float, ...] = ()
        self.float_details: Mapping[str, float] = {}

    def measure_float(self, progress: Progress = silent) -> float:
        """Measure the float model. Raises ConfigError if the task states another metric value."""
        if self.cache.folder and not self.cache.context:
            self.cache.context = self.identity.content
            if self.identity.unidentified:
                self.cache.leave_disk(self.identity.unidentified[0])

        def evaluated() -> Evaluation:
            return evaluate_from_start(self.task, self.task.model, self.eval_batch, progress)

        found = self.cache.get("float", self.eval_batch, evaluated, Evaluation)
        metric, self.eval_samples = found.metric, found.samples
        stated = self.task.stated_metric
        if stated is not None and abs(metric - stated) > self.task.tolerance:
            raise ConfigError(
                f"The float model reaches the metric its task states ({stated:g} within {self.task.tolerance:g}), but "
                f"got {metric:.4f} on {self.eval_samples} samples. Check weights and data, or set task.float_metric."
            )
        self.float_metric, self.float_scores, self.float_details = metric, found.scores, found.details
        return metric

    @property
    def float_metrics(self) -> dict[str, float]:
        """The metric of the float model and its details, as they stand on the run of a study."""
        return {f"float/{self.task.metric_name}": self.float_metric, **detail_metrics(self.float_details, "float/")}

    @cached_property
    def identity(self) -> Identity:
        """Everything that results depend on beside settings. Every sample is read once for it."""
        return of_task(self.task, self.skip, self.fold_functional_norms, self.split_shared)

    def prepare(self) -> QuantizedModel:
        """Trace on the first evaluation batch, prove the float graph, and trace again at the deployed shape."""
        batch, _ = next(batches(self.task, "evaluation", min(self.eval_batch, 4), limit=1))
        self.example = example = model_inputs(self.task, batch)
        task, fold = self.task, self.fold_functional_norms
        self._prepared = prepare(task.model, example, self.skip, fold, task.cached_attrs, self.split_shared)
        self._weights = FloatWeights(task.model, self._prepared)
        way_out = f"Give the shape it is deployed at: task.deploy_shape is {self.task.deploy_shape}."
        self._deploy = graph_at(self._prepared, deploy_inputs(self.task, example), way_out)
        return self._prepared

    @property
    def prepared(self) -> QuantizedModel:
        """The prepared model."""
        return self._prepared if self._prepared is not None else self.prepare()

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

    # ---- float weights

    @property
    def weights(self) -> FloatWeights:
        """The float weights that the prepared model has at present."""
        assert self.prepared is not None
        assert self._weights is not None
        return self._weights

    def repair(self) -> Repaired | None:
        """Give the prepared model the weights of `default_repair` from now on; return it, None without steps."""
        self.weights.use(self._repaired(self.default_repair, self.default_calibration))
        self.present_repair = self.default_repair
        return self.weights.now

    @contextmanager
    def repaired(self, settings: RepairSettings, calibration: CalibrationSettings) -> Iterator[None]:
        """Let the prepared model have the weights of another repair inside; it must be calibrated there."""
        before = self.weights.now, self.present_repair
        self.weights.use(self._repaired(settings, calibration))
        self.present_repair = settings
        try:
            yield
        finally:
            self.weights.use(before[0])
            self.present_repair = before[1]

    def _repaired(self, settings: RepairSettings, calibration: CalibrationSettings) -> Repaired | None:
        if not settings.steps:
            return None

        def tried() -> Repaired:
            before = self.weights.now
            self.weights.use(None)
            try:
                int8, int16 = self.template(QDtype.qint8)[1], self.template(QDtype.qint16)[1]
                with seeded():
                    return repaired(self.task, self.prepared, settings, calibration, int8, [int16])
            finally:
                self.weights.use(before)

        return self.cache.get("repair", [settings, calibration.divisor, self.rules], tried, Repaired)

    def key(self, *parts: Any) -> list[Any]:
        """Return a key of the cache with the present float weights in it, if a repair has changed them."""
        return [*parts, *([self.weights.digest] if self.weights.digest else [])]

    # ---- calibration

    def calibrate(self, settings: CalibrationSettings, progress: Progress = silent) -> CalibrationStats:
        """Collect statistics of `steps` batches of `batch_size` in one pass, which serves all methods and dtypes.

        A smaller calibration set is used whole, as the guide asks.
        """
        steps = self.calibration_steps(settings)

        def passed() -> CalibrationStats:
            with seeded():
                return collect(self.prepared, self.calibration_batches(settings), progress, settings.sampling, by_batch)

        by_batch = settings.averaging_constant is not None
        key = self.key(settings.batch_size, steps, settings.sampling, by_batch, self.augmented(settings))
        return self.cache.get("calibration", key, passed, CalibrationStats)

    def calibration_steps(self, settings: CalibrationSettings) -> int:
        """Return the number of calibration batches; fewer than `settings.steps` if the data have no more."""
        split = split_for(self.task, "calibration", settings.augment)
        return min(settings.steps, steps_of(self.task, settings.batch_size, split))

    def calibration_batches(self, settings: CalibrationSettings) -> Iterator[tuple[Any, int]]:
        """Yield (model inputs, batch size) of the calibration."""
        split, begin = split_for(self.task, "calibration", settings.augment), beginning(self.task, self.prepared)
        stream = batches(self.task, split, settings.batch_size, self.calibration_steps(settings), begin=begin)
        return ((model_inputs(self.task, batch), size) for batch, size in stream)

    def augmented(self, settings: CalibrationSettings) -> str:
        """Return the digest of the augmented calibration data if `settings` read them, else an empty text."""
        return self._augmented if settings.augment else ""

    @cached_property
    def _augmented(self) -> str:
        unidentified: list[str] = []
        found = split_digest(self.task, "calibration_augmented", unidentified)
        for part in unidentified:
            self.cache.leave_disk(part)
        return found

    def check_data(self) -> None:
        """Read one batch of each split, so that data that cannot work raise before anything long runs."""
        for split in ("calibration", "evaluation"):
            for _ in batches(self.task, split, self.default_calibration.batch_size, limit=1):
                pass

    # ---- qconfigs

    def all(self, dtype: QDtype) -> list[str]:
        """Call `apply` with every operator at `dtype`."""
        return self.apply(self.template(dtype)[1])

    def apply(self, applied: QConfig) -> list[str]:
        """Set dtypes and scales of `applied` under the default calibration; return the findings of calibration."""
        calibration = self.default_calibration
        return apply_scales(self.prepared, self.calibrate(calibration), applied, calibration)

    @property
    def precisions(self) -> Precisions:
        """The precisions that operators may have and get, ranked by the present sensitivities."""
        if self._precisions is None or self._precisions.sensitivities is not self.sensitivities:
            self._precisions = Precisions(self.graph, self.rules, self.sensitivities, lambda: self.pricer)
        return self._precisions

    def template(self, dtype: QDtype) -> tuple[QConfig, QConfig]:
        """Return (requested, applied) with every operator at `dtype`."""
        return self._observed(*self.precisions.template(dtype))

    @property
    def scores(self) -> dict[str, float]:
        """Activation sensitivities by operator; empty before the ranking."""
        return self.precisions.scores

    def resolve(self, settings: QConfigSettings) -> tuple[QConfig, QConfig]:
        """Return the (requested, applied) qconfig of a trial. A ratio between 0 and 1 needs sensitivities.

        Calibration methods that the present repair has chosen for single operators are in it.
        """
        return self._observed(*self.precisions.resolve(settings))

    def _observed(self, requested: QConfig, applied: QConfig) -> tuple[QConfig, QConfig]:
        now = self._weights.now if self._weights else None
        return (now.observed(requested), now.observed(applied)) if now else (requested, applied)

    def cost(self, qconfig: QConfig) -> CostReport:
        """Predict the cost at the deployed shape."""
        return self.pricer.report(qconfig)

    @cached_property
    def pricer(self) -> Pricer:
        """The cost model on the deployed graph, with the measured profile. ConfigError if one of them is unusable."""
        if isinstance(self.cost_model, str):
            raise ConfigError(self.cost_model)
        measured = None
        if self.profile is not None:
            measured, self.unmatched = measure(self.profile, self.deploy_graph, self.template(self.profile_dtype)[1])
        return Pricer(self.deploy_graph, self.cost_model, measured)
