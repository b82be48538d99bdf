"""The device's changes to a requested qconfig, applied and explained before anything runs.

The real tool chain lowers int16 to int8 silently in several places. This module applies the same rules, which are data
(conf/device/*.yaml), and adds the reason to every operator whose precision changes. The rules apply in this order:

    1. an operator whose output is int8 only is lowered
    2. at an input that takes int8 only, the producer is lowered, unless the operator asks for qint8 at that position
    3. fp16 that reaches a GEMM or an int8-only position is cast there; between vector operators it stays
    4. of the int16 inputs of a product of two activations (a matmul, or a conv or linear whose weight is computed) the
       most sensitive stays (plugin mode: the order of its name setters)
    5. an int16 x int16 GEMM has no int32 output: it is quantized to int16
    6. a requested input dtype that the producer has anyway is removed (no cast)
    7. the values inside a norm or softmax are int16, or float16 where the operator is

A qconfig that these fallbacks cannot correct is refused with a ConfigError.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from qflow.core.device_rules import DeviceRules
from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError
from qflow.core.graph import GEMM_KINDS, ModelGraph, OpKind, OpNode
from qflow.core.qconfig import OpQConfig, QConfig


def apply_rules(
    graph: ModelGraph,
    requested: QConfig,
    rules: DeviceRules,
    scores: Mapping[str, float] | None = None,
    ranking: Sequence[str] | None = None,
) -> QConfig:
    """Return the qconfig that the device will run, with the reason for each change in `OpQConfig.fallback`.

    `scores` rank the two producers of a product: the more sensitive one keeps int16 (without scores the first one).
    `ranking` selects the plugin's rule instead: operators in the order of its name setters. Raises ConfigError where no
    fallback helps: int16 x int16, fp16 without a float path, a high-precision output inside the model.
    """
    state = _Applied(graph, dict(requested.ops), rules)
    for node in graph.nodes:
        if node.kind.value in rules.int8_outputs and node.quantizer is not None:
            state.lower(node.name, f"the output of {node.kind} is int8 only")
        if node.attrs.get("attention_output") and node.quantizer is not None and rules.attention_int8:
            state.lower(node.name, "the output of nn.MultiheadAttention is int8 only")
    for node in graph.nodes:
        state.take_int8(node)
    for node in graph.nodes:
        state.cast_floats(node)
    for node in graph.nodes:
        if node.two_activations:
            state.spare_product(node, scores or {}, ranking)
    for node in graph.nodes:
        state.bound_accumulator(node)
    state.drop_equal_inputs()
    state.set_inner()
    for node in graph.nodes:
        if node.quantizer is not None:
            state.refuse(node)
    return QConfig(march=rules.march, ops=state.ops)


def input_dtypes(graph: ModelGraph, qconfig: QConfig, name: str) -> tuple[QDtype, ...]:
    """Return the dtypes of the tensors that the operator reads, through transparent operators; float32 if unquantized.

    An input dtype that the operator asks for (a requantization on that edge) replaces the producer's.
    """
    arriving = _Applied(graph, dict(qconfig.ops), None).arriving(graph.by_name[name])
    return tuple(dtype for at in arriving for dtype in at)


@dataclass
class _Applied:
    """The state of a qconfig while the rules are applied."""

    graph: ModelGraph
    ops: dict[str, OpQConfig]
    rules: DeviceRules | None

    def __post_init__(self) -> None:
        self.owners = {n.quantizer: n.name for n in self.graph.quantized}
        self.place = {n.name: i for i, n in enumerate(self.graph.nodes)}

    @property
    def device(self) -> DeviceRules:
        assert self.rules is not None
        return self.rules

    def owner(self, name: str) -> str:
        return self.owners[self.graph.by_name[name].quantizer]

    def op(self, node: OpNode) -> OpQConfig | None:
        return self.ops[self.owner(node.name)] if node.quantizer is not None else None

    def asked(self, node: OpNode, position: int) -> QDtype | None:
        op = self.op(node)
        return op.input[position] if op and op.input and position < len(op.input) else None

    def given(self, producer: str) -> list[QDtype]:
        """Return the output dtypes of the quantizers of `producer` or its sources."""
        outputs = [self.ops[self.owner(source)].output for source in self.graph.source(producer)]
        return [dtype if dtype is not None else QDtype.float32 for dtype in outputs]

    def arriving(self, node: OpNode) -> list[list[QDtype]]:
        """Return the dtypes by input position, as the operator computes with them."""
        asked = [self.asked(node, i) for i in range(len(node.inputs))]
        return [[a] if a is not None else self.given(p) for a, p in zip(asked, node.inputs, strict=True)]

    def change(self, name: str, reason: str, **changes: object) -> None:
        op = self.ops[self.owner(name)]
        why = "; ".join(dict.fromkeys([*filter(None, [op.fallback]), reason]))
        self.ops[self.owner(name)] = replace(op, **changes, fallback=why)  # type: ignore[arg-type]

    def lower(self, name: str, reason: str) -> None:
        """Lower int16 to int8; a fixed scale is multiplied by 2^8, so that its threshold stays."""
        op = self.ops[self.owner(name)]
        if op.output != QDtype.qint16:
            return
        if op.fixed_scale is not None:
            reason += f"; fixed scale x 256 = {op.fixed_scale * 256:.6g} keeps its threshold"
        self.change(name, reason, output=QDtype.qint8, fixed_scale=op.fixed_scale and op.fixed_scale * 256)

    def ask(self, node: OpNode, position: int, dtype: QDtype, reason: str) -> None:
        """Let the operator requantize its input at `position` to `dtype`."""
        op = self.op(node)
        assert op is not None
        held = (*(op.input or ()), *[None] * len(node.inputs))[: len(node.inputs)]
        self.change(node.name, reason, input=(*held[:position], dtype, *held[position + 1 :]))

    def int8_only(self, node: OpNode) -> Sequence[int]:
        """Return the input positions of `node` that take int8 only."""
        if node.fused_add and self.device.fused_add_int8:
            return 0, 1
        return self.device.int8_inputs.get(node.kind.value, ())

    def take_int8(self, node: OpNode) -> None:
        positions = self.int8_only(node)
        for i, producer in enumerate(node.inputs):
            if i not in positions:
                continue
            fused = node.fused_add and self.device.fused_add_int8
            what = "conv and add fused) takes int8 inputs" if fused else f"{node.kind}) takes int8 input"
            reason, asked = f"{node.name} ({what} only", self.asked(node, i)
            if asked not in (None, QDtype.qint8):
                raise ConfigError(f"On {self.device.march} {reason}, but got input {asked}. Leave its input at qint8.")
            for source in self.graph.source(producer) if asked is None else ():
                self.lower(source, reason)

    def cast_floats(self, node: OpNode) -> None:
        """Cast fp16 inputs of a GEMM to the GEMM's own integer dtype, and those at int8-only positions to qint8."""
        op, positions = self.op(node), self.int8_only(node)
        gemm = node.kind in GEMM_KINDS and node.kind.value not in self.device.float16_kinds
        for i, producer in enumerate(node.inputs):
            if QDtype.float16 not in self.given(producer) or self.asked(node, i) or not (gemm or i in positions):
                continue
            if op is None:
                raise ConfigError(
                    f"On {self.device.march} {node.name} ({node.kind}) takes int8 input only, but got float16 from "
                    f"{self.graph.source(producer)[0]}. Use qint8 or qint16 there."
                )
            int8 = i in positions or (op.weight == QDtype.qint16 and not self.device.dual(node))
            dtype = QDtype.qint8 if int8 or op.output == QDtype.qint8 else QDtype.qint16
            self.ask(node, i, dtype, f"reads fp16 from {self.graph.source(producer)[0]}: cast to {dtype} at its input")

    def spare_product(self, node: OpNode, scores: Mapping[str, float], ranking: Sequence[str] | None) -> None:
        """Lower the int16 inputs of a product of two activations beyond those that the device allows.

        Positions are counted, not producers: both inputs of q @ q^T are q, so q is lowered.
        """
        matmul = node.kind == OpKind.matmul
        allowed = self.device.matmul_int16_inputs if matmul else 1 + self.device.dual(node)
        factors = self.arriving(node)[: None if matmul else 2]  # the bias of a convolution is no factor
        int16 = [i for i, dtypes in enumerate(factors) if QDtype.qint16 in dtypes]
        if ranking is None:
            int16.sort(key=lambda i: (-self._score(node, i, scores), self._first(node, i)))
        else:  # if neither is ranked, the first producer is lowered
            rank = {name: float(k) for k, name in reversed(list(enumerate(ranking)))}
            int16.sort(key=lambda i: (min(self._ranks(node, i, rank)), -self._first(node, i)))
        many = "no int16 input" if not allowed else f"{allowed} int16 input only"
        for i in int16[allowed:]:
            if self.asked(node, i) is not None:
                self.ask(node, i, QDtype.qint8, f"{node.name} takes {many}: input {i} is cast to qint8")
            else:
                for source in self.graph.source(node.inputs[i]):
                    self.lower(source, f"{node.name} takes {many}")

    def _first(self, node: OpNode, position: int) -> int:
        return min(self.place[s] for s in self.graph.source(node.inputs[position]))

    def _score(self, node: OpNode, position: int, scores: Mapping[str, float]) -> float:
        return max(scores.get(self.owner(s), 0.0) for s in self.graph.source(node.inputs[position]))

    def _ranks(self, node: OpNode, position: int, rank: Mapping[str, float]) -> list[float]:
        return [rank.get(self.owner(s), math.inf) for s in self.graph.source(node.inputs[position])]

    def multiplied(self, node: OpNode) -> list[QDtype]:
        """Return the dtypes of the two tensors that a GEMM multiplies; fewer if they are unknown."""
        op, arriving = self.op(node), self.arriving(node)
        if op is None or node.kind not in GEMM_KINDS or not arriving:
            return []
        if not node.two_activations:
            return [max(arriving[0], key=lambda d: d.rank), op.weight or QDtype.qint8] if arriving[0] else []
        return [max(at, key=lambda d: d.rank) for at in arriving[:2] if at]

    def bound_accumulator(self, node: OpNode) -> None:
        op = self.op(node)
        if op is None or op.output is not None or self.device.dual_high_precision or not self.device.dual(node):
            return
        if self.multiplied(node) == [QDtype.qint16] * 2:
            reason = "int16 x int16 has no high-precision output: qint16"
            self.change(node.name, reason, output=QDtype.qint16, observer=None if op.observer == "kl" else op.observer)

    def drop_equal_inputs(self) -> None:
        for node in self.graph.quantized:
            op = self.ops[node.name]
            if op.input:
                calls = [n for n in self.graph.nodes if n.quantizer == node.quantizer]
                kept = tuple(
                    None if all({a} == set(self.given(c.inputs[i])) for c in calls if i < len(c.inputs)) else a
                    for i, a in enumerate(op.input)
                )
                self.ops[node.name] = replace(op, input=kept if any(kept) else None)

    def set_inner(self) -> None:
        for node in self.graph.quantized:
            op, known = self.ops[node.name], node.inner and node.kind.value in self.device.inner_int16
            dtype = QDtype.float16 if op.output == QDtype.float16 else QDtype.qint16
            if op.inner != (inner := dtype if known else None):
                self.ops[node.name] = replace(op, inner=inner)

    def refuse(self, node: OpNode) -> None:
        """Raise ConfigError for a precision that no fallback corrects."""
        op, rules = self.op(node), self.device
        assert op is not None
        inputs = [dtype for at in self.arriving(node) for dtype in at]
        if self.multiplied(node) == [QDtype.qint16] * 2 and not self.device.dual(node):
            raise ConfigError(
                f"{rules.march} under OpenExplorer {rules.oe_version} has no int16 x int16, but got int16 weight and "
                f"int16 input for {node.name}. Keep the weight at qint8, or its producer's output at qint8."
            )
        if QDtype.float32 in (op.output, op.weight, *(op.input or ())):
            raise ConfigError(
                f"{rules.march} computes in qint8, qint16 and some float16, but got float32 for {node.name}."
            )
        if op.output is None and self.owner(node.name) not in self.graph.high_precision:
            raise ConfigError(
                f"A high-precision output is for a GEMM whose result leaves the model, but got one for {node.name} "
                f"({node.kind}). Use qint16."
            )
        gemm = node.kind in GEMM_KINDS
        able = node.kind.value in rules.float16_kinds or node.kind == OpKind.constant
        floats = QDtype.float16 in (op.output, op.weight) and not able
        if floats or (QDtype.float16 in inputs and gemm and not able):
            where = "GEMM engine has no float path" if gemm else "vector unit does not run it"
            what = "fp16 output" if floats else "fp16 input"
            raise ConfigError(
                f"fp16 on {rules.march} is for {', '.join(rules.float16_kinds) or 'no operator'}, but got {what} for "
                f"{node.name} ({node.kind}): the {where}. Use qint16."
            )
