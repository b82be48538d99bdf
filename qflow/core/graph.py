"""A traced and fused model as data: operators with the user's names, their shapes and their inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property


class OpKind(str, Enum):
    """The kind of an operator on the device; the values appear in device files."""

    input = "input"  # the QuantStub that qflow sees at every float input
    constant = "constant"  # a parameter, buffer or fresh tensor that an operator reads beside its inputs
    skipped = "skipped"  # a module that the user keeps in float; it runs on the host
    conv = "conv"
    conv_transpose = "conv_transpose"
    linear = "linear"
    matmul = "matmul"
    norm = "norm"  # batch norm that could not be fused
    layer_norm = "layer_norm"
    relu = "relu"  # a clamp: it costs nothing behind a GEMM and little elsewhere
    lut = "lut"  # SiLU, GELU, sigmoid, tanh, ...: a table look-up on the vector engine
    softmax = "softmax"
    add = "add"
    mul = "mul"
    arithmetic = "arithmetic"  # sub, div, pow, ...
    concat = "concat"
    resize = "resize"
    max_pool = "max_pool"
    avg_pool = "avg_pool"
    grid_sample = "grid_sample"
    reduce = "reduce"
    move = "move"  # reshape, permute, slice, split: values and scale stay the same
    order = "order"  # topk, sort, argmax
    other = "other"

    def __str__(self) -> str:
        return self.value


GEMM_KINDS = frozenset({OpKind.conv, OpKind.conv_transpose, OpKind.linear, OpKind.matmul})
# The plugin's template gives these a high-precision output (3.0.17: neither Conv1d nor transposed).
HIGH_PRECISION_KINDS = frozenset({OpKind.conv, OpKind.linear, OpKind.matmul})
# The device computes these in several steps, with values of their own between them (OpNode.inner).
COMPOUND_KINDS = frozenset({OpKind.layer_norm, OpKind.softmax})
WEIGHTED_KINDS = frozenset({OpKind.conv, OpKind.conv_transpose, OpKind.linear})
# They pass their input values on, all or some of them, so they have no quantizer and use the producer's scale.
TRANSPARENT_KINDS = frozenset({OpKind.move, OpKind.max_pool, OpKind.order})


@dataclass(frozen=True)
class OpNode:
    """One operator call of the fused graph.

    `name` is the user's module path (`head.conv`), `head.conv(1)` for its second call, or `head[add]` for a
    functional; a fused group has the name of its first module, or of its add if it contains one. `inputs` are the
    names of the producing operators; a constant is a producer too (`const[pos_embed]`). `shape` is that of the (first)
    output, batch first. `attrs` holds the integers that the cost model needs (channels, kernel elements, groups, weight
    elements, ...).
    """

    name: str
    kind: OpKind
    op_type: str
    inputs: tuple[str, ...]
    shape: tuple[int, ...]
    quantizer: str | None = None
    """Name of the output quantizer; calls of a shared module share one. None for transparent operators."""
    weight: str | None = None
    """Name of the weight quantizer (the module path), or None."""
    fused: tuple[str, ...] = ()
    """Operators absorbed into this one, in order of execution."""
    fused_types: tuple[str, ...] = ()
    """The operators that follow the first one in the group: BN, Add, ReLU, ReLU6 (as in the plugin's class names)."""
    attrs: Mapping[str, int] = field(default_factory=dict)
    inner: tuple[str, ...] = ()
    """Quantizers of the values inside a norm or softmax (`norm3.var_mean.pre_mean`), in order of computation."""
    operands: tuple[float | None, ...] = ()
    """Arguments of an element-wise functional in order: the number, or None for a tensor."""

    def contains(self, name: str) -> bool:
        """True if `name` is that of a value inside this operator: `norm3.var_mean.pre_mean` is inside `norm3`."""
        return self.kind in COMPOUND_KINDS and name.startswith(f"{self.name}.")

    @property
    def fused_add(self) -> bool:
        """True if an add is part of the group; both its inputs are int8 only on nash-e/m."""
        return "Add" in self.fused_types

    @property
    def two_activations(self) -> bool:
        """True if a GEMM multiplies two activations: a matmul, or a conv or linear whose weight is computed."""
        return self.kind == OpKind.matmul or (self.kind in WEIGHTED_KINDS and self.weight is None)

    @property
    def macs(self) -> int:
        """Multiply-accumulates of one call; 0 for an operator that is no GEMM or has no known weights."""
        if self.kind == OpKind.matmul:
            return self.elements * self.attrs.get("inner", 0)
        if self.kind not in GEMM_KINDS or "weights" not in self.attrs:
            return 0
        return self.positions * self.attrs["weights"]

    @property
    def positions(self) -> int:
        """How often the whole weight is applied: the output positions, or the input positions of a transposed conv."""
        if "positions" in self.attrs:
            return self.attrs["positions"]
        return self.elements // self.attrs["out"] if self.attrs.get("out") else 0

    @property
    def elements(self) -> int:
        """Number of elements of the output."""
        total = 1
        for size in self.shape:
            total *= size
        return total


@dataclass(frozen=True)
class ModelGraph:
    """Operators in order of execution; `outputs` pairs the name of each model output with its producer."""

    nodes: tuple[OpNode, ...]
    outputs: tuple[tuple[str, str], ...]
    calls: Mapping[str, int] = field(default_factory=dict)
    """How often each leaf module was called; 0 for a module that was never reached, if it would have a quantizer."""
    unfused: tuple[tuple[str, str, str], ...] = ()
    """Fusable pairs that were not fused: first operator, second operator, reason."""
    notes: tuple[str, ...] = ()
    """Notes of tracing: data-dependent sites, constants, operators left in float."""
    state: tuple[str, ...] = ()
    """Operators whose result the model keeps as temporal state and reads in its next call."""

    @cached_property
    def by_name(self) -> dict[str, OpNode]:
        """Operators by name."""
        return {node.name: node for node in self.nodes}

    @cached_property
    def consumers(self) -> dict[str, tuple[str, ...]]:
        """Names of the operators that read each operator's output."""
        found: dict[str, list[str]] = {node.name: [] for node in self.nodes}
        for node in self.nodes:
            for source in node.inputs:
                found[source].append(node.name)
        return {name: tuple(readers) for name, readers in found.items()}

    @cached_property
    def quantized(self) -> tuple[OpNode, ...]:
        """Operators that own an output quantizer, in order of execution; of calls that share one, the first."""
        return self._owners("quantizer")

    @property
    def n_operators(self) -> int:
        """The number of operators, as every report counts them: those that the qconfig decides, after fusion.

        A fused group counts once, and so do the calls of a shared module, which have one quantizer. Operators that pass
        their input on (reshape, max pooling, topk) have no precision of their own and are not counted.
        """
        return len(self.quantized)

    @cached_property
    def weighted(self) -> tuple[OpNode, ...]:
        """Operators that own a weight quantizer, in order of execution; of calls that share one, the first."""
        return self._owners("weight")

    def _owners(self, what: str) -> tuple[OpNode, ...]:
        first: dict[str, OpNode] = {}
        for node in self.nodes:
            if getattr(node, what) is not None:
                first.setdefault(getattr(node, what), node)
        return tuple(first.values())

    def sources(self, name: str) -> tuple[str, ...]:
        """Return the nearest operators upstream of `name` that own a quantizer; transparent ones are passed."""
        if name not in self._sources:
            found = [above for source in self.by_name[name].inputs for above in self.source(source)]
            self._sources[name] = tuple(dict.fromkeys(found))
        return self._sources[name]

    @cached_property
    def _sources(self) -> dict[str, tuple[str, ...]]:
        """What `sources` has found: the device rules ask for it again and again."""
        return {}

    def source(self, producer: str) -> tuple[str, ...]:
        """Return `producer` itself if it owns a quantizer, else its sources."""
        return (producer,) if self.by_name[producer].quantizer is not None else self.sources(producer)

    @cached_property
    def high_precision(self) -> tuple[str, ...]:
        """GEMMs whose result leaves the model and is read by no operator: their output needs no quantizer.

        On J6E/M such a GEMM outputs its int32 accumulator (guide: high-precision output). Temporal state is read by the
        next call, so it is quantized.
        """
        outputs = {producer for _, producer in self.outputs} - set(self.state)

        def leaves(name: str) -> bool:
            readers = self.consumers[name]
            if not readers:
                return name in outputs
            through = all(self.by_name[r].op_type.endswith(("Identity", "Dropout", "Dropout2d")) for r in readers)
            return name not in outputs and through and all(leaves(r) for r in readers)

        return tuple(
            node.name
            for node in self.nodes
            if node.kind in HIGH_PRECISION_KINDS
            and not node.op_type.endswith("Conv1d")
            # a shared module owns one quantizer: all its calls must leave the model
            and all(leaves(other.name) for other in self.nodes if other.quantizer == node.quantizer)
        )
