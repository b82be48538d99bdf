"""From tape to plan: where quantizers are placed, and the fused graph as data.

A fused group (fusion.py) is named after its first module, or after its add; its quantizer comes after its last member.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from torch import nn

from qflow.core.graph import TRANSPARENT_KINDS, WEIGHTED_KINDS, ModelGraph, OpKind, OpNode
from qflow.quant.model.fusion import Fuser
from qflow.quant.model.shared_modules import SETTING, own_modules
from qflow.quant.trace.masks import before_softmax, keeping, pure_masks
from qflow.quant.trace.tape import Op, Tape, Weight


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
    """Operator calls that every forward pass makes: those that depend on the inputs. Others may fill a cache."""
    functional_norms: Mapping[str, str] = field(default_factory=dict)
    """Call of `F.batch_norm` that is folded into the operator before it -> the module with its statistics."""
    fold_functional_norms: bool = False
    split: frozenset[str] = frozenset()
    """Paths of modules whose calls have a quantizer each, instead of one for all (shared_modules.py)."""
    inner_at: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Call of a norm or softmax -> name of an inner value -> name of its quantizer."""
    masks: frozenset[str] = frozenset()
    """Output quantizers that keep -inf, because it masks a softmax (trace/masks.py)."""


def make_plan(
    tape: Tape,
    model: nn.Module,
    skip: Collection[str] = (),
    fold_functional_norms: bool = False,
    split: Collection[str] = (),
) -> Plan:
    """Fuse the tape of `model` and place quantizers, in the modules of `split` one for each call.

    The model is only read.
    """
    fuser = Fuser(tape, model, fold_functional_norms, split)
    groups = fuser.groups()
    live = _live(tape)
    layout = _Layout(tape, before_softmax(tape.ops, fuser.readers, fuser.leaving), split)
    layout.place_all(groups, live, fuser.readers)
    norms = _folded(groups, live)
    functional_norms = {norm.name: norm.statistics for norm in norms.values() if norm.statistics}
    notes = [*tape.notes, *_dead_notes(tape, live), *_norm_notes(functional_norms)]
    notes += [*_split_notes(model, layout.calls), *_unknown_notes(layout.nodes, tape.ops)]
    graph = ModelGraph(
        nodes=tuple(layout.nodes),
        outputs=tuple((name, layout.name_of[index]) for name, index in tape.outputs),
        calls=tape.calls,
        unfused=tuple(reversed(fuser.unfused)),
        notes=tuple(notes),
        state=tuple(dict.fromkeys(layout.name_of[index] for index in tape.state if index in layout.name_of)),
    )
    return Plan(
        graph,
        layout.output_at,
        layout.constants_at,
        {op.name: op.weight for op in tape.ops if op.weight is not None and op.index in live},
        layout.reads,
        {path: norm.owner or "" for path, norm in norms.items()},
        frozenset(name for name, count in Counter(layout.output_at.values()).items() if count > 1),
        frozenset(skip),
        tape.names,
        tape.sites,
        frozenset(key[0] for key in tape.sites),
        {op.module: op.name for op in tape.ops if op.module},
        frozenset(op.name for op in tape.ops if op.kind != OpKind.constant and op.op_type != "torch.setitem"),
        functional_norms=functional_norms,
        fold_functional_norms=fold_functional_norms,
        split=frozenset(split),
        inner_at=layout.inner_at,
        masks=frozenset(layout.masks),
    )


def _folded(groups: Mapping[int, list[Op]], live: Collection[int]) -> dict[str, Op]:
    """Module path of a weighted operator -> the batch norm that is folded into its weight."""
    return {
        members[0].module: members[1]
        for members in groups.values()
        if members[-1].index in live
        and members[0].module
        and len(members) > 1
        and members[1].kind == OpKind.norm
        and members[1].owner
    }


def _live(tape: Tape) -> set[int]:
    """Operators that an output depends on; the others are bookkeeping of the user's Python code."""
    return _upstream(tape, [index for _, index in tape.outputs])


def _upstream(tape: Tape, stack: list[int]) -> set[int]:
    live: set[int] = set()
    while stack:
        index = stack.pop()
        if index not in live:
            live.add(index)
            stack.extend(tape.ops[index].inputs)
    return live


class _Layout:
    """The nodes of the fused graph, and where a forward pass finds their quantizers."""

    def __init__(self, tape: Tape, masked: Collection[int], split: Collection[str]) -> None:
        self.ops = tape.ops
        self.split = split
        self.calls: Counter[str] = Counter()
        """Module of `split` -> number of its quantizers."""
        self.keeping = keeping(tape.ops, masked)
        self.pure_masks = pure_masks(tape.ops, masked)
        self.masks: set[str] = set()
        self.nodes: list[OpNode] = []
        self.name_of: dict[int, str] = {}
        self.output_at: dict[str, str] = {}
        self.constants_at: dict[str, dict[int, str]] = {}
        self.reads: dict[str, tuple[tuple[str, int], ...]] = {}
        self.inner_at: dict[str, dict[str, str]] = {}

    def place_all(
        self, groups: Mapping[int, list[Op]], live: Collection[int], readers: Mapping[int, list[int]]
    ) -> None:
        """Append the groups and single operators that an output depends on, each where its last member runs."""
        inside = {op.index for members in groups.values() for op in members[1:]}
        by_last = {members[-1].index: members for members in groups.values()}
        for op in self.ops:
            if op.index not in live or (op.index in groups and len(groups[op.index]) > 1):
                continue
            if op.index not in inside or op.index in by_last:
                self.place(by_last.get(op.index, [op]), reenters=bool(readers[op.index]))

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
        if node.inner:
            self.inner_at[node.name] = dict(zip(members[0].inner, node.inner, strict=True))

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
        own = named.module if named.module not in self.split else None
        if quantized and named.module and own is None:
            self.calls[named.module] += 1
        quantizer = (own or named.name) if quantized else None
        node = OpNode(
            name=named.name,
            kind=kind,
            op_type=head.op_type,
            inputs=tuple(self.name_of[index] for index, _, _ in inputs),
            shape=last.shape,
            quantizer=quantizer,
            weight=_weight_name(head),
            fused=tuple(m.name for m in members if m is not named),
            fused_types=tuple(_fused_type(m) for m in members[1:]),
            attrs={**head.attrs, "integer_input": 1} if self.of_integer_input(members) else head.attrs,
            inner=tuple(f"{quantizer}.{name}" for name in head.inner) if quantizer else (),
            operands=head.operands,
        )
        return node, tuple((name, slot) for _, name, slot in inputs)

    def of_integer_input(self, members: list[Op]) -> bool:
        """True if the float result is made of an integer input of the model, not of a mask or index of its own."""
        read = [index for member in members for index in member.inputs]
        if not members[-1].floating or any(self.ops[index].floating for index in read):
            return False
        seen: set[int] = set()
        while read:
            index = read.pop()
            if self.ops[index].floating or index in seen:
                continue
            if self.ops[index].kind == OpKind.input:
                return True
            seen.add(index)
            read.extend(self.ops[index].inputs)
        return False


def _weight_name(op: Op) -> str | None:
    if op.kind not in WEIGHTED_KINDS:
        return None
    return op.module or (op.weight.name if op.weight is not None else None)


def _fused_type(op: Op) -> str:
    if op.kind in (OpKind.norm, OpKind.add):
        return {OpKind.norm: "BN", OpKind.add: "Add"}[op.kind]
    return "ReLU6" if op.op_type.lower().endswith("relu6") else "ReLU"


def _dead_notes(tape: Tape, live: set[int]) -> list[str]:
    decisive = _upstream(tape, list(tape.read_by_python))
    return [
        f"{op.name}: computed, but no output depends on it: left in float"
        for op in tape.ops
        if op.index not in live | decisive and (op.kind in WEIGHTED_KINDS or op.kind == OpKind.input)
    ]


def _norm_notes(folded: Mapping[str, str]) -> list[str]:
    if not folded:
        return []
    first, more = next(iter(folded)), f" and {len(folded) - 1} more" if len(folded) > 1 else ""
    return [
        f"{first}: folded{more} because of fold_functional_norms: the plugin folds an nn.BatchNorm2d only, so split"
    ]


def _split_notes(model: nn.Module, calls: Mapping[str, int]) -> list[str]:
    """For each split module: the plugin would give it one quantizer, so the float model has to be changed."""
    return [
        f"{path}: each of its {count} calls has a quantizer because of {SETTING}: the plugin has one for a module, "
        f"so before it gets the model, {own_modules(model, path)}"
        for path, count in calls.items()
        if count > 1
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
