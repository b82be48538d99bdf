"""What a training minimizes: the user's loss, the teacher's, and the dampening of weights, each if it is asked for."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from qflow.core.errors import ConfigError
from qflow.core.settings import QatSettings
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.trace.calling import call_model
from qflow.quant.train.dampening import dampened
from qflow.quant.train.loss import Loss, called, one_number
from qflow.quant.train.teacher import Teacher, recorded, require_comparable


class Objective:
    """The loss of a model on a batch. `prepared` is the model inside a compiled or distributed form of it."""

    def __init__(
        self, loss: Loss | None, settings: QatSettings, teacher: Teacher | None, prepared: QuantizedModel | None
    ) -> None:
        if loss is None and teacher is None:
            raise ConfigError(
                "QAT needs a loss, but got none. Set qat.loss._target_ to a function of (outputs, batch), or let the "
                "float model teach: qat.teacher.weight=1."
            )
        if teacher is not None and prepared is not None:
            require_comparable(prepared, settings.teacher, settings.mode)
        self.loss, self.settings, self.teacher, self.prepared = loss, settings, teacher, prepared

    def __call__(self, model: nn.Module, inputs: Any, batch: Any) -> Any:
        """What the user's loss returns, with the weighted terms of teacher and dampening added."""
        quantized = model if isinstance(model, QuantizedModel) else self.prepared
        answers = self.teacher.answers(inputs) if self.teacher is not None else None
        with ExitStack() as stack:
            names = self.settings.teacher.features if self.teacher is not None else ()
            features = stack.enter_context(recorded(quantized.model if quantized is not None else model, names))
            damps = self.settings.dampening and quantized is not None
            weights = quantized.weights if quantized is not None and damps else {}
            terms = stack.enter_context(dampened(weights))
            outputs = call_model(model, inputs)
        value = called(self.loss, outputs, batch) if self.loss is not None else None
        more: list[Tensor] = []
        if self.teacher is not None and answers is not None:
            more += [self.settings.teacher.weight * self.teacher.loss(outputs, features, answers)]
        if terms:
            more += [self.settings.dampening * sum(terms.values())]  # type: ignore[list-item]
        if not more:
            return value
        return sum(more) if value is None else one_number(value) + sum(more)
