"""The plugin's QATMode and PrepareMethod (reference, sections 1.1 and 4.1), and its QAT state of a prepared model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from contextlib import ExitStack
from enum import Enum
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from qflow.core.errors import ConfigError
from qflow.core.qconfig import QConfig
from qflow.core.settings import CalibrationSettings, QatSettings
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.train.qat_state import qat_state


class QATMode(str, Enum):
    """How batch norms train (formulas: quant/model/weighted.py). Evaluation folds them in every mode."""

    FuseBN = "fuse_bn"
    """The norm is folded and its statistics stay as they are."""
    WithBN = "with_bn"
    """The norm stays and trains with its statistics; it is folded for evaluation."""
    WithBNReverseFold = "with_bn_reverse_fold"
    """As WithBN, with weight scales of the folded weight, so that folding changes nothing."""


class PrepareMethod(str, Enum):
    """How the plugin finds the graph. qflow traces a run of the example inputs, which is JIT."""

    EAGER = "eager"
    SYMBOLIC = "symbolic"
    JIT = "jit"
    JIT_STRIP = "jit-strip"


_current = [QATMode.FuseBN]
_training: WeakKeyDictionary[QuantizedModel, ExitStack] = WeakKeyDictionary()
"""Models in the QAT state. It is kept here and not in the model, so that a model can be copied while it trains."""


def set_qat_mode(mode: QATMode | str) -> None:
    """Set the mode of the models that are prepared from now on. Raises ConfigError for another value."""
    _current[0] = _member(QATMode, mode, "A QAT mode")


def get_qat_mode() -> QATMode:
    """Return the mode that the next `qflow.prepare` gives its model."""
    return _current[0]


def require_traced(method: PrepareMethod | str) -> None:
    """Raise ConfigError for a method that finds the graph without running the model.

    JIT_STRIP is JIT here: it cuts what lies outside of QuantStub and DeQuantStub, and `skip` names what stays float.
    """
    if _member(PrepareMethod, method, "A prepare method") in (PrepareMethod.EAGER, PrepareMethod.SYMBOLIC):
        raise ConfigError(
            f"qflow.prepare traces a run of the example inputs, but got {PrepareMethod(method)!s}, which traces none. "
            "Write method=qflow.PrepareMethod.JIT_STRIP, or leave it out."
        )


def with_keywords(model: nn.Module, inputs: Any, keywords: Mapping[str, Any] | None) -> Any:
    """Return example inputs in one form: positional ones join the keywords under the names that `forward` gives them.

    Raises ConfigError if there are none or they do not fit.
    """
    if keywords is not None and not isinstance(keywords, Mapping):
        raise ConfigError(f"example_kw_inputs is a dict, but got {type(keywords).__name__}. Write {{name: tensor}}.")
    if inputs is None and not keywords:
        raise ConfigError("qflow.prepare needs example inputs, but got none. Give a batch: prepare(model, images).")
    if not keywords:
        return inputs
    if isinstance(inputs, Mapping):
        return {**inputs, **keywords}
    given = () if inputs is None else inputs if isinstance(inputs, tuple) else (inputs,)
    try:
        return dict(inspect.signature(model.forward).bind_partial(*given, **keywords).arguments)
    except TypeError as error:
        raise ConfigError(
            f"Example inputs are arguments of forward, but got a call with {error}. Correct it."
        ) from error


def enter_qat(prepared: QuantizedModel, mode: QATMode, qconfig: QConfig, calibration: CalibrationSettings) -> None:
    """Put a calibrated model into the QAT state (quant/train/qat_state.py), until `leave_qat`."""
    stack = ExitStack()
    stack.enter_context(qat_state(prepared, QatSettings(mode=mode.value), qconfig=qconfig, calibration=calibration))
    _training[prepared] = stack


def leave_qat(prepared: QuantizedModel) -> None:
    """End the QAT state of a model, if it is in it: the model is in eval mode then, its weight scales are renewed."""
    stack = _training.pop(prepared, None)
    if stack is not None:
        stack.close()


def _member(kind: type[Any], value: object, what: str) -> Any:
    try:
        return kind(value)
    except ValueError:
        names = ", ".join(f"{kind.__name__}.{member.name}" for member in kind)
        raise ConfigError(f"{what} is one of {names}, but got {value!r}.") from None
