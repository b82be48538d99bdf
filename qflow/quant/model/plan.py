"""From tape to plan: which operators fuse, where quantizers are placed, and the fused graph as data.

Fusion follows the plugin: conv / linear / transposed conv, then batch norm, then add, then ReLU or ReLU6, each
optional, in this order. Nothing fuses across a value that another operator reads, nor around a shared module. A
group is named after its first module, or after its add; its quantizer comes after its last member.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from torch import nn

from qflow.core.graph import TRANSPARENT_KINDS, WEIGHTED_KINDS, ModelGraph, OpKind, OpNode
from qflow.quant.trace.masks import before_softmax, keeping, pure_masks
from qflow.quant.trace.tape import Op, Tape, Weight

RELU_TYPES = frozenset(
    {"torch.relu", "torch.relu6", "torch.nn.modules.activation.ReLU", "torch.nn.modules.activation.ReLU6"}
)


@dataclass(frozen=True)
class Plan:
    """All that a forward pass of the prepared model needs, by operator name and module path."""

    graph: ModelGraph
    output_at: dict[str, str]
    """Operator (last member of its group) -> name of the quantizer of its result."""
    constants_at: dict[str, dict[int, str]]
    """Operator call -> slot of a constant among the call's tensors -> name of the constant's quantizer."""
    weights_at: dict[str, Weight]
    """Call of a functional -> its weight."""
    reads: dict[str, tuple[tuple[str, int], ...]]
    """Operator -> for each of its graph inputs, the call that reads it and the slot among that call's tensors."""
    folds: dict[str, str]
    """Module path of a weighted operator -> path of the batch norm that is folded into its weight."""
    shared: frozenset[str]
    """Output quantizers that several calls share."""
    skipped: frozenset[str]
    """Paths of modules that stay float."""
    known: frozenset[str]
    """Names of all recorded operator calls; a call with another name was not traced."""
    sites: dict[tuple[str, str, int, int], str]
    """Functional, function and line in the user's code, index at this site -> name of the call (trace/sites.py)."""
    bases: frozenset[str]
    """The functionals in `sites` (`head[mul]`), without the number of the call."""
    last_call: dict[str, str]
    """Leaf or skipped module -> its last recorded call."""
    visited: frozenset[str]
    """Operator calls that every forward pass makes: `known` without constants and writes."""
    masks: frozenset[str] = frozenset()
    """Output quantizers that keep -inf, because it masks a softmax (trace/masks.py)."""


class _Fuser:
    def __init__(self, tape: Tape, model: nn.Module) -> None:
        self.ops = tape.ops
        self.calls = tape.calls
        self.modules = dict(model.named_modules())
        self.readers: dict[int, list[int]] = {op.index: [] for op in tape.ops}
        for op in tape.ops:
            for source in op.inputs:
                self.readers[source].append(op.index)
        self.leaving = {index for _, index in tape.outputs}
        self.taken: set[int] = set()
        self.unfused: list[tuple[str, str, str]] = []

    def shared(self, op: Op) -> bool:
        return op.module is not None and self.calls.get(op.module, 1) > 1

    def join(self, current: Op, candidate: Op) -> Op | None:
        """`candidate` if it may join the group after `current`; otherwise None, and the reason is kept in `unfused`."""
        if candidate.index in self.taken:
            return None
        reason = ""
        if candidate.kind == OpKind.norm and current.kind == OpKind.linear and len(current.shape) != 2:
            reason = "a batch norm over dim 1 is not over the features of a linear layer with more than two dims"
        elif len(self.readers[current.index]) > 1 or current.index in self.leaving:
            reason = f"{current.name} has several consumers"
        elif self.shared(current):
            reason = f"{current.name} is a shared module"
        elif candidate.kind == OpKind.norm and self.shared(candidate):  # a shared ReLU has no state: it may fuse
            reason = f"{candidate.name} is a shared module"
        if reason:
            self.unfused.append((current.name, candidate.name, reason))
            return None
        return candidate

    def follow(self, current: Op, kind: str) -> Op | None:
        """The operator of the wanted kind that reads `current`, if it may join the group."""
        if current.attrs.get("attention_output"):
            return None  # the plugin treats nn.MultiheadAttention as one module: nothing fuses into it
        for index in self.readers[current.index]:
            candidate = self.ops[index]
            if kind == "norm":
                wanted = self.is_norm(current, candidate)
            elif kind == "add":
                wanted = candidate.kind == OpKind.add and len(candidate.inputs) == 2
                wanted = wanted and not any(self.ops[i].kind == OpKind.constant for i in candidate.inputs)
                # `alpha` counts as a third operand; a sum that broadcasts cannot be done in the accumulators
                wanted = wanted and len(candidate.operands) <= 2
                wanted = wanted and all(self.ops[i].shape == candidate.shape for i in candidate.inputs)
            else:
                wanted = candidate.op_type in RELU_TYPES
            if wanted:
                return self.join(current, candidate)
        return None

    def is_norm(self, current: Op, candidate: Op) -> bool:
        """True for a batch norm that can be folded; for another one, `unfused` gets the reason."""
        reason = ""
        if candidate.kind == OpKind.norm and candidate.module is None:
            reason = "a functional batch norm owns no module: use nn.BatchNorm2d"
        elif candidate.kind == OpKind.norm:
            module = self.modules[candidate.module or ""]
            if not getattr(module, "track_running_stats", False):
                reason = "a batch norm without running statistics cannot be folded"
        elif candidate.scope != current.scope and "BatchNorm" in self.scope_type(candidate):
            reason = f"{self.scope_type(candidate)} is not recognised as a batch norm: use nn.BatchNorm2d in eval mode"
        else:
            return False
        if reason:
            self.unfused.append((current.name, candidate.module or candidate.scope or candidate.name, reason))
        return not reason

    def scope_type(self, op: Op) -> str:
        return type(self.modules[op.scope]).__name__ if op.scope in self.modules and op.module is None else ""

    def groups(self) -> dict[int, list[Op]]:
        """Index of the head -> members. If two convs feed one add, the later conv takes it: its accumulator sums up."""
        found: dict[int, list[Op]] = {}
        for head in reversed(self.ops):
            if head.kind not in WEIGHTED_KINDS or (head.module is None and head.weight is None):
                continue
            members = [head]
            for kind in ("norm", "add", "relu"):
                member = self.follow(members[-1], kind)
                if member is not None:
                    members.append(member)
                    self.taken.add(member.index)
            found[head.index] = members
        return found


def make_plan(tape: Tape, model: nn.Module, skip: Collection[str] = ()) -> Plan:
    """Fuse the tape of `model` and place quantizers. The model is only read."""
    fuser = _Fuser(tape, model)
    groups = fuser.groups()
    live = _live(tape)
    inside = {op.index: head for head, members in groups.items() for op in members[1:]}
    by_last: dict[int, list[Op]] = {members[-1].index: members for members in groups.values()}
    masked = before_softmax(tape.ops, fuser.readers, fuser.leaving)
    layout = _Layout(tape, masked)
    folds: dict[str, str] = {}
    for op in tape.ops:
        if op.index not in live or (op.index in groups and len(groups[op.index]) > 1):
            continue
        if op.index in inside and op.index not in by_last:
            continue
        members = by_last.get(op.index, [op])
        layout.place(members, reenters=bool(fuser.readers[op.index]))
        for member in members[1:2]:
            if member.kind == OpKind.norm and members[0].module and member.module:
                folds[members[0].module] = member.module
    graph = ModelGraph(
        nodes=tuple(layout.nodes),
        outputs=tuple((name, layout.name_of[index]) for name, index in tape.outputs),
        calls=tape.calls,
        unfused=tuple(reversed(fuser.unfused)),
        notes=(*tape.notes, *_dead_notes(tape, live), *_unknown_notes(layout.nodes, tape.ops)),
    )
    return Plan(
        graph,
        layout.output_at,
        layout.constants_at,
        {op.name: op.weight for op in tape.ops if op.weight is not None and op.index in live},
        layout.reads,
        folds,
        frozenset(name for name, count in Counter(layout.output_at.values()).items() if count > 1),
        frozenset(skip),
        tape.names,
        tape.sites,
        frozenset(key[0] for key in tape.sites),
        {op.module: op.name for op in tape.ops if op.module},
        tape.names - {op.name for op in tape.ops if op.kind == OpKind.constant or op.op_type == "torch.setitem"},
        masks=frozenset(layout.masks),
    )


def _live(tape: Tape) -> set[int]:
    """Operators that an output depends on; the others are bookkeeping of the user's Python code."""
    live: set[int] = set()
    stack = [index for _, index in tape.outputs]
    while stack:
        index = stack.pop()
        if index not in live:
            live.add(index)
            stack.extend(tape.ops[index].inputs)
    return live


class _Layout:
    """The nodes of the fused graph, and where a forward pass finds their quantizers."""

    def __init__(self, tape: Tape, masked: Collection[int]) -> None:
        self.ops = tape.ops
        self.keeping = keeping(tape.ops, masked)
        self.pure_masks = pure_masks(tape.ops, masked)
        self.masks: set[str] = set()
        self.nodes: list[OpNode] = []
        self.name_of: dict[int, str] = {}
        self.output_at: dict[str, str] = {}
        self.constants_at: dict[str, dict[int, str]] = {}
        self.reads: dict[str, tuple[tuple[str, int], ...]] = {}

    def place(self, members: list[Op], reenters: bool) -> None:
        """Append the node of one group or single operator; `reenters` is True if another operator reads its result."""
        node, reads = self.node(members, reenters)
        self.nodes.append(node)
        self.reads[node.name] = reads
        for member in members:
            self.name_of[member.index] = node.name
            for index, slot in zip(member.inputs, member.slots, strict=True):
                if self.ops[index].kind == OpKind.constant:
                    self.constants_at.setdefault(member.name, {})[slot] = self.ops[index].name
        if node.quantizer is not None and members[-1].index in self.keeping:
            self.masks.add(node.quantizer)
        if node.quantizer is not None and node.kind != OpKind.constant:
            self.output_at[members[-1].name] = node.quantizer

    def node(self, members: list[Op], reenters: bool) -> tuple[OpNode, tuple[tuple[str, int], ...]]:
        head, last = members[0], members[-1]
        add = next((m for m in members if m.kind == OpKind.add and m is not head), None)
        owned = {m.index for m in members}
        # Indices and masks have no scale; in view_as(like) and gather(index) the values come from the first tensor.
        inputs = [
            (index, member.name, slot)
            for member in members
            for index, slot in zip(member.inputs, member.slots, strict=True)
            if index not in owned and self.ops[index].floating
        ]
        kind = OpKind.move if head.index in self.pure_masks else head.kind
        if kind in TRANSPARENT_KINDS and head.op_type != "torch.setitem":
            inputs = inputs[:1]
        named = add or head
        quantized = last.floating and kind not in TRANSPARENT_KINDS
        if head.kind == OpKind.skipped:  # runs on the host; a result that operators read comes back to the device
            quantized = quantized and reenters and head.single
        node = OpNode(
            name=named.name,
            kind=kind,
            op_type=head.op_type,
            inputs=tuple(self.name_of[index] for index, _, _ in inputs),
            shape=last.shape,
            quantizer=(named.module or named.name) if quantized else None,
            weight=_weight_name(head),
            fused=tuple(m.name for m in members if m is not named),
            fused_types=tuple(_fused_type(m) for m in members[1:]),
            attrs=head.attrs,
            operands=head.operands,
        )
        return node, tuple((name, slot) for _, name, slot in inputs)


def _weight_name(op: Op) -> str | None:
    if op.kind not in WEIGHTED_KINDS:
        return None
    return op.module or (op.weight.name if op.weight is not None else None)


def _fused_type(op: Op) -> str:
    if op.kind in (OpKind.norm, OpKind.add):
        return {OpKind.norm: "BN", OpKind.add: "Add"}[op.kind]
    return "ReLU6" if op.op_type.lower().endswith("relu6") else "ReLU"


def _dead_notes(tape: Tape, live: set[int]) -> list[str]:
    return [
        f"{op.name}: computed, but no output depends on it: left in float"
        for op in tape.ops
        if op.index not in live and (op.kind in WEIGHTED_KINDS or op.kind == OpKind.input)
    ]


def _unknown_notes(nodes: list[OpNode], ops: list[Op]) -> tuple[str, ...]:
    several = {op.name for op in ops if not op.single}
    return tuple(
        f"{node.name}: {node.op_type} is not known to the device table"
        + (": of a deformable convolution the weight stays float" if "deform_conv" in node.op_type else "")
        + (", and of its several results only the first is quantized" if node.name in several else "")
        for node in nodes
        if node.kind == OpKind.other
    )
