"""The plugin's templates as rules over the fused graph (reference, section 2.5), and the setters of a trial.

A template decides the output dtype only. `TemplateQconfigSetter` asks several templates in order; the first answer
decides. Everything else (observer, weight dtype, frozen scale) comes from its default qconfig, which is also the answer
if no template has one. The all-int8, all-int16 and high-precision templates are TemplateSetter and HighPrecisionOutput
(setter.py).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError
from qflow.core.graph import HIGH_PRECISION_KINDS, ModelGraph, OpKind, OpNode
from qflow.core.qconfig import OpQConfig
from qflow.core.setter import (
    ChosenSetter,
    HighPrecisionOutput,
    ModuleNameSetter,
    SensitiveSetter,
    Setter,
    TemplateSetter,
    WeightSetter,
)
from qflow.core.settings import QConfigSettings
from qflow.core.table_setter import TableRow, TableSetter


@dataclass(frozen=True)
class GemmInt8:
    """Sets the outputs of GEMMs to int8: conv, linear, matmul (neither Conv1d nor transposed, as in 3.0.x)."""

    def __call__(self, node: OpNode, graph: ModelGraph) -> OpQConfig | None:
        return _output(node, QDtype.qint8, "template GEMM int8") if is_gemm(node) else None


@dataclass(frozen=True)
class UpToGemm:
    """Sets int16 from the inputs of `target` (or the one at `position`) upstream to the first GEMM, which is included.

    Every branch is followed, also through concat; a branch without a GEMM ends at the model's input.
    """

    target: OpKind
    position: int | None = None
    name: str = ""

    def __call__(self, node: OpNode, graph: ModelGraph) -> OpQConfig | None:
        return _output(node, QDtype.qint16, f"template {self.name}") if self._feeds(node, graph) else None

    def _feeds(self, node: OpNode, graph: ModelGraph) -> bool:
        """Return whether a path leads from a call of `node` to the target without a GEMM in between."""
        stack = [n for n in graph.nodes if n.quantizer == node.quantizer]
        seen = {n.name for n in stack}
        while stack:
            source = stack.pop()
            for reader in (graph.by_name[name] for name in graph.consumers[source.name]):
                read = (i for i, name in enumerate(reader.inputs) if name == source.name)
                if reader.kind == self.target and (self.position is None or self.position in read):
                    return True
                if reader.name not in seen and not is_gemm(reader):
                    seen.add(reader.name)
                    stack.append(reader)
        return False


def is_gemm(node: OpNode) -> bool:
    """Return whether `node` is in the plugin's set of GEMMs (section 2.5)."""
    return node.kind in HIGH_PRECISION_KINDS and not node.op_type.endswith("Conv1d")


GEMM_TO_LAYER_NORM_INT16 = UpToGemm(OpKind.layer_norm, name="GEMM to layer norm int16")
GEMM_TO_SOFTMAX_INT16 = UpToGemm(OpKind.softmax, name="GEMM to softmax int16")
GEMM_TO_GRID_INT16 = UpToGemm(OpKind.grid_sample, 1, name="GEMM to grid int16")
TEMPLATES: Mapping[str, Setter] = {
    "gemm_int8": GemmInt8(),
    "gemm_to_layer_norm_int16": GEMM_TO_LAYER_NORM_INT16,
    "gemm_to_softmax_int16": GEMM_TO_SOFTMAX_INT16,
    "gemm_to_grid_int16": GEMM_TO_GRID_INT16,
}


@dataclass(frozen=True)
class TemplateQconfigSetter:
    """Asks `templates` in order; `default_qconfig` is the answer if none of them has one."""

    default_qconfig: OpQConfig
    templates: Sequence[Callable[[OpNode, ModelGraph], OpQConfig | None]] = ()

    def __call__(self, node: OpNode, graph: ModelGraph) -> OpQConfig | None:
        default = self.default_qconfig
        weight = (default.weight or QDtype.qint8) if node.weight else None
        for template in self.templates:
            answer = template(node, graph)
            if answer is not None:
                observer = None if default.observer == "kl" and answer.output == QDtype.qint16 else default.observer
                return replace(default, output=answer.output, observer=observer, weight=weight, rule=answer.rule)
        return replace(default, weight=weight, rule=default.rule or f"template default {default.output}")


@dataclass(frozen=True)
class Assigned:
    """The operators whose output and those whose weight an assignment sets to int16."""

    outputs: tuple[str, ...]
    weights: tuple[str, ...] = ()


def trial_setters(
    settings: QConfigSettings,
    candidates: Sequence[str],
    scores: Mapping[str, float],
    rows: Sequence[TableRow] = (),
    float16: Sequence[str] = (),
    assigned: Assigned | None = None,
    weights: Mapping[str, Collection[str]] | None = None,
) -> list[Setter]:
    """Return the setters of one trial in order: names, fp16, int16, high-precision outputs, templates, the rest.

    `float16` are the operators that get fp16; `assigned` the outputs and weights that get int16, in place of a ratio.
    `candidates` are the operators that can be int16 on the device (ratio_candidates), `scores` activation
    sensitivities. `rows` (table_rows of the sensitivity table) are needed for weights and for counting rows; `weights`
    are those that sensitive_type=both may promote (TableSetter.weights). Raises ConfigError.
    """
    plain = settings.sensitive_type == "activation" and settings.counting == "operators"
    if not plain and settings.int16_ratio > 0 and not rows:
        raise ConfigError(
            f"sensitive_type {settings.sensitive_type} with counting {settings.counting} needs a sensitivity table, "
            "but got none. Rank first."
        )
    candidates = [name for name in candidates if name not in float16]
    sensitive: Setter = SensitiveSetter(scores, candidates, settings.int16_ratio)
    if assigned is not None:
        sensitive = ChosenSetter(assigned.outputs, QDtype.qint16, "assigned int16")
    elif not plain:
        sensitive = TableSetter(
            tuple(rows),
            ratio=settings.int16_ratio,
            sensitive_type=settings.sensitive_type,
            counting=settings.counting,
            candidates=candidates,
            weights=weights if settings.sensitive_type == "both" else None,
        )
    return [
        ModuleNameSetter(settings.modules),
        *([WeightSetter(assigned.weights)] if assigned and assigned.weights else []),
        ChosenSetter(tuple(float16), QDtype.float16, "sensitive at int16"),
        sensitive,  # before the high-precision outputs, whose weights it may promote
        HighPrecisionOutput(),
        *(TEMPLATES[name] for name in settings.rules),
        TemplateSetter(QDtype(settings.template)),
    ]


def _output(node: OpNode, dtype: QDtype, rule: str) -> OpQConfig:
    return OpQConfig(output=dtype, weight=QDtype.qint8 if node.weight else None, rule=rule)
