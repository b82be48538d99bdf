"""The state that all trials of a study share: float metric, traced model, statistics, bad cases, sensitivities, cost.

Each part is computed once and cached by content; a cache hit gives the same numbers as a computation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from qflow.analysis.badcases.files import BadcaseInputs
from qflow.analysis.measures.metrics import Custom
from qflow.analysis.measures.tables import BadcaseTable, SensitivityTable
from qflow.analysis.sensitivity.candidates import Candidate, candidates, finer
from qflow.analysis.sensitivity.measure import sensitivity
from qflow.core.device_rules import DeviceRules
from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError
from qflow.core.graph import ModelGraph
from qflow.core.qconfig import QConfig
from qflow.core.record import digest
from qflow.core.settings import CalibrationSettings, QConfigSettings, SensitivitySettings
from qflow.cost_model.latency import Pricer
from qflow.cost_model.measured import measure
from qflow.cost_model.model import CostModel
from qflow.cost_model.records import CostReport
from qflow.quant.model.calibrate import CalibrationStats, apply_scales, collect
from qflow.quant.model.graph_at_shape import graph_at
from qflow.quant.model.prepare import prepare
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.tasks.identity import Identity, of_task, split_digest
from qflow.tasks.loading import seeded
from qflow.tasks.task import Task, batches, deploy_inputs, model_inputs, split_for
from qflow.trial.badcases import BadcaseStage
from qflow.trial.cache import Cache
from qflow.trial.frames import beginning, chosen_frames, evaluate_from_start, steps_of
from qflow.trial.precisions import Precisions
from qflow.trial.record import Evaluation

Progress = Callable[[int], None]


def silent(_: int) -> None:
    """Progress that is not shown."""


@dataclass
class SharedState:
    """One task on one device. The stages fill it in order; each part is computed once."""

    task: Task
    rules: DeviceRules
    cost_model: CostModel | str  # a text says why the device has none; then nothing can be priced
    sensitivity_settings: SensitivitySettings = field(default_factory=SensitivitySettings)
    default_calibration: CalibrationSettings = field(default_factory=CalibrationSettings)
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
    own_metric: Custom | None = None
    """The user's own metric, which chooses the bad cases."""
    searches: Path | None = None
    """Folder where long searches for bad cases save their state."""
    unmatched: tuple[str, ...] = ()
    """Layers of the report without an operator of the model, and operators without a layer."""

    def __post_init__(self) -> None:
        self._precisions: Precisions | None = None
        self._prepared: QuantizedModel | None = None
        self.example: Any = None  # the model inputs that the model is traced on
        self._deploy: ModelGraph | None = None
        self.sensitivities: SensitivityTable | None = None
        self.badcases: BadcaseTable | None = None
        self.float_scores: tuple[float, ...] = ()

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
        self.float_metric, self.float_scores = metric, found.scores
        return metric

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

    def calibrate(self, settings: CalibrationSettings, progress: Progress = silent) -> CalibrationStats:
        """Collect statistics of `steps` batches of `batch_size` in one pass, which serves all methods and dtypes.

        A smaller calibration set is used whole, as the guide asks.
        """
        split = split_for(self.task, "calibration", settings.augment)
        steps = min(settings.steps, steps_of(self.task, settings.batch_size, split))

        def passed() -> CalibrationStats:
            begin = beginning(self.task, self.prepared)
            stream = batches(self.task, split, settings.batch_size, steps, begin=begin)
            inputs = ((model_inputs(self.task, b), size) for b, size in stream)
            with seeded():
                return collect(self.prepared, inputs, progress, settings.sampling, by_batch)

        by_batch = settings.averaging_constant is not None
        key = [settings.batch_size, steps, settings.sampling, by_batch, self.augmented(settings)]
        return self.cache.get("calibration", key, passed, CalibrationStats)

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

    def find_badcases(
        self, progress: Progress = silent, inputs: BadcaseInputs | None = None, applied: QConfig | None = None
    ) -> BadcaseTable:
        """Find the calibration samples on which the model under `applied` (default all int8) differs most from float.

        `progress` counts steps; `inputs` keeps the model inputs of the chosen samples.
        """
        calibration, model = self.default_calibration, applied or self.template(QDtype.qint8)[1]
        stage = self.badcase_stage
        key = [model.digest, calibration, self.augmented(calibration), self.rules, *stage.key]
        for part in stage.unidentified:
            self.cache.leave_disk(part)

        def searched() -> BadcaseTable:
            self.apply(model)
            state = stage.state(self.searches, lambda: self.identity, key, self.cache.say)
            return stage.search(self.prepared, progress, inputs, state)

        self.badcases = self.cache.get("badcases", key, searched, BadcaseTable)
        if inputs is not None and not inputs.samples:  # the table came from the cache
            stage.read(self.prepared, self.badcases, inputs)
        return self.badcases

    @property
    def badcase_stage(self) -> BadcaseStage:
        """The search for bad cases; its `steps` are what its progress counts."""
        return BadcaseStage(self.task, self.sensitivity_settings, self.default_calibration.batch_size, self.own_metric)

    def all(self, dtype: QDtype) -> list[str]:
        """Call `apply` with every operator at `dtype`."""
        return self.apply(self.template(dtype)[1])

    def apply(self, applied: QConfig) -> list[str]:
        """Set dtypes and scales of `applied` under the default calibration; return the findings of calibration."""
        calibration = self.default_calibration
        return apply_scales(self.prepared, self.calibrate(calibration), applied, calibration)

    def cases(self) -> list[Any]:
        """Return the model inputs of the bad cases as one batch; with state, each as a frame with the state before."""
        worst = (self.badcases or self.find_badcases()).chosen
        if (cached := self.prepared.cached) is not None:
            return [*chosen_frames(self.task, cached, list(worst))]
        return [model_inputs(self.task, b) for b, _ in batches(self.task, "calibration", len(worst), indices=worst)]

    @property
    def quantizers(self) -> int:
        """Number of rows of a sensitivity table at int8: outputs, values inside them, weights."""
        inner = sum(len(n.inner) for n in self.graph.quantized if self.template(QDtype.qint8)[1].ops[n.name].inner)
        return self.graph.n_operators - len(self.graph.high_precision) + inner + len(self.graph.weighted)

    def rank(self, progress: Progress = silent, applied: QConfig | None = None) -> SensitivityTable:
        """Measure the sensitivity of every quantizer at each of `sensitivity.dtypes`; `progress` counts rows.

        With `applied`, each quantizer has a row at its own dtype and one at each of these dtypes that is finer.
        """
        settings, badcases = self.sensitivity_settings, self.badcases or self.find_badcases(applied=applied)

        def ranked() -> SensitivityTable:
            rows, cases = self._candidates(applied), self.cases()
            return sensitivity(self.task.model, self.prepared, cases, settings=settings, rows=rows, on_row=progress)

        calibration, model = self.default_calibration, applied.digest if applied else "templates"
        key = [model, calibration, self.augmented(calibration), settings, list(badcases.chosen), self.rules]
        self.sensitivities = self.cache.get("sensitivity", key, ranked, SensitivityTable)
        return self.sensitivities

    def _candidates(self, applied: QConfig | None) -> list[Candidate]:
        """Return the rows of a ranking, and leave the model with the qconfig that they belong to."""
        base = applied or self.template(QDtype.qint8)[1]
        self.apply(base)
        rows = own = candidates(self.prepared) if applied else []
        for dtype in (QDtype.parse(name, "sensitivity.dtypes") for name in self.sensitivity_settings.dtypes):
            self.all(QDtype.qint8 if dtype == QDtype.float16 else dtype)
            rows = rows + finer(candidates(self.prepared, dtype), own, rows)
        self.apply(base)
        return rows

    @property
    def analysis_key(self) -> str:
        """Digest of all that bad cases, layers, sensitivities and advice depend on; empty if a part has no digest."""
        calibration = self.default_calibration
        settings = [calibration, self.augmented(calibration), self.sensitivity_settings, self.rules]
        return "" if self.identity.unidentified else digest([self.identity.content, settings])

    # ---- qconfigs

    @property
    def precisions(self) -> Precisions:
        """The precisions that operators may have and get, ranked by the present sensitivities."""
        if self._precisions is None or self._precisions.sensitivities is not self.sensitivities:
            self._precisions = Precisions(self.graph, self.rules, self.sensitivities, lambda: self.pricer)
        return self._precisions

    def template(self, dtype: QDtype) -> tuple[QConfig, QConfig]:
        """Return (requested, applied) with every operator at `dtype`."""
        return self.precisions.template(dtype)

    @property
    def scores(self) -> dict[str, float]:
        """Activation sensitivities by operator; empty before the ranking."""
        return self.precisions.scores

    def resolve(self, settings: QConfigSettings) -> tuple[QConfig, QConfig]:
        """Return the (requested, applied) qconfig of a trial. A ratio between 0 and 1 needs sensitivities."""
        return self.precisions.resolve(settings)

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
