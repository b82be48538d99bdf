"""The analysis of a model on the state that trials share: bad cases and sensitivities, computed once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qflow.analysis.badcases.files import BadcaseInputs
from qflow.analysis.badcases.looks import Looks
from qflow.analysis.measures.metrics import Custom
from qflow.analysis.measures.tables import BadcaseTable, SensitivityTable
from qflow.analysis.sensitivity.candidates import Candidate, candidates, finer
from qflow.analysis.sensitivity.measure import Measure, sensitivity
from qflow.analysis.sensitivity.parts import Part
from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError
from qflow.core.qconfig import QConfig
from qflow.core.record import digest, from_dict, plain
from qflow.core.repair_settings import RepairSettings
from qflow.core.settings import CalibrationSettings, SensitivitySettings
from qflow.tasks.task import batches, model_inputs
from qflow.trial.badcases import BadcaseStage
from qflow.trial.frames import chosen_frames
from qflow.trial.parts import Answer, Asking, Workers
from qflow.trial.shared import Progress, SharedState, silent


@dataclass
class AnalysedState(SharedState):
    """The shared state with the analysis that ranks operators."""

    sensitivity_settings: SensitivitySettings = field(default_factory=SensitivitySettings)
    own_metric: Custom | None = None
    """The user's own metric, which chooses the bad cases."""
    searches: Path | None = None
    """Folder where long searches for bad cases save their state."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.badcases: BadcaseTable | None = None
        self.workers: Workers | None = None
        """Other processes that compute parts of an analysis."""

    def find_badcases(
        self, progress: Progress = silent, inputs: BadcaseInputs | None = None, applied: QConfig | None = None
    ) -> BadcaseTable:
        """Find the calibration samples on which the model under `applied` (default all int8) differs most from float.

        `progress` counts steps; `inputs` keeps the model inputs of the chosen samples.
        """
        calibration, model = self.default_calibration, applied or self.template(QDtype.qint8)[1]
        stage = self.badcase_stage
        key = self.key(model.digest, calibration, self.augmented(calibration), self.rules, *stage.key)
        for part in stage.unidentified:
            self.cache.leave_disk(part)

        def searched() -> BadcaseTable:
            self.apply(model)
            state = stage.state(self.searches, lambda: self.identity, key, self.cache.say)
            asking = None if self.task.cached_attrs else self._asking("bad cases", applied)  # frames follow each other
            if asking is None:
                return stage.search(self.prepared, progress, inputs, state)
            return stage.search(self.prepared, progress, None, state, asking.looks)

        self.badcases = self.cache.get("badcases", key, searched, BadcaseTable)
        if inputs is not None and not inputs.samples:  # the table came from the cache or other processes
            stage.read(self.prepared, self.badcases, inputs)
        return self.badcases

    @property
    def badcase_stage(self) -> BadcaseStage:
        """The search for bad cases; its `steps` are what its progress counts."""
        return BadcaseStage(self.task, self.sensitivity_settings, self.default_calibration.batch_size, self.own_metric)

    def cases(self) -> list[Any]:
        """Return the model inputs of the bad cases as one batch; with state, each as a frame with the state before."""
        return self._samples((self.badcases or self.find_badcases()).chosen)

    def _samples(self, chosen: Sequence[int]) -> list[Any]:
        if (cached := self.prepared.cached) is not None:
            return [*chosen_frames(self.task, cached, list(chosen))]
        return [model_inputs(self.task, b) for b, _ in batches(self.task, "calibration", len(chosen), indices=chosen)]

    @property
    def quantizers(self) -> int:
        """Number of rows of a sensitivity table at int8: outputs, values inside them, weights."""
        ops = self.template(QDtype.qint8)[1].ops
        inner = sum(len(n.inner) for n in self.graph.quantized if ops[n.name].inner)
        return self.graph.n_operators - len(self.graph.high_precision) + inner + len(self.graph.weighted)

    def rank(self, progress: Progress = silent, applied: QConfig | None = None) -> SensitivityTable:
        """Measure the sensitivity of every quantizer at each of `sensitivity.dtypes`; `progress` counts rows.

        With `applied`, each quantizer has a row at its own dtype and one at each of these dtypes that is finer.
        """
        settings, badcases = self.sensitivity_settings, self.badcases or self.find_badcases(applied=applied)

        def ranked() -> SensitivityTable:
            rows, cases = self._candidates(applied), self.cases()
            asking = self._asking("sensitivity", applied, badcases.chosen)
            model, prepared, elsewhere = self.weights.model, self.prepared, asking.rows if asking else None
            return sensitivity(
                model, prepared, cases, settings=settings, rows=rows, on_row=progress, elsewhere=elsewhere
            )

        calibration, model = self.default_calibration, applied.digest if applied else "templates"
        key = self.key(model, calibration, self.augmented(calibration), settings, list(badcases.chosen), self.rules)
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

    # ---- parts in other processes

    def _asking(self, stage: str, applied: QConfig | None, chosen: Sequence[int] = ()) -> Asking | None:
        """Return what asks for parts of an analysis of the model under `applied`; None without several workers."""
        if self.workers is None or self.workers.workers < 2:
            return None
        about = {
            "stage": stage,
            "qconfig": None if applied is None else plain(applied),
            "calibration": plain(self.default_calibration),
            "repair": plain(self.present_repair),
            "weights": self.weights.digest,
            "chosen": list(chosen),
        }
        return Asking(self.workers, about, self.cache.say)

    def answering(self, about: Mapping[str, Any], stack: ExitStack) -> Callable[[Any], Answer]:
        """Return what answers parts of the analysis that another process asks for; `stack` undoes what it needs.

        Raises ConfigError if the repaired weights here are not those of the other process.
        """
        stack.callback(setattr, self, "default_calibration", self.default_calibration)
        self.default_calibration = calibration = from_dict(CalibrationSettings, about["calibration"])
        assert self.prepared is not None
        stack.enter_context(self.repaired(from_dict(RepairSettings, about["repair"]), calibration))
        if self.weights.digest != about["weights"]:
            raise ConfigError(
                f"A worker repairs the weights as the study does, but got {self.weights.digest or 'none'} in place of "
                f"{about['weights'] or 'none'}. Use executor=serial."
            )
        applied = None if about["qconfig"] is None else from_dict(QConfig, about["qconfig"])
        if about["stage"] == "bad cases":
            self.apply(applied or self.template(QDtype.qint8)[1])
            looks, stage = Looks(self.task.model, self.prepared, self.own_metric), self.badcase_stage
            return lambda step: stage.look(self.prepared, looks, step).plain()
        rows, cases = self._candidates(applied), self._samples(about["chosen"])
        measure = Measure(self.weights.model, self.prepared, cases, rows, self.sensitivity_settings)

        def measured(part: Mapping[str, Any]) -> Answer:
            with torch.no_grad():
                return measure.part(Part(**part))

        return measured

    @property
    def analysis_key(self) -> str:
        """Digest of all that bad cases, layers, sensitivities and advice depend on; empty if a part has no digest."""
        calibration = self.default_calibration
        settings = self.key(calibration, self.augmented(calibration), self.sensitivity_settings, self.rules)
        return "" if self.identity.unidentified else digest([self.identity.content, settings])
