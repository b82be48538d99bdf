"""Which operators of a tape fuse, as in the plugin, and why others do not.

A conv, linear or transposed conv fuses with the batch norm, the add and the ReLU or ReLU6 that follow, each optional,
in this order. Nothing fuses across a value that another operator reads, nor around a shared module; where its calls
are split, an add and a ReLU fuse.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from torch import nn

from qflow.core.graph import WEIGHTED_KINDS, OpKind
from qflow.quant.trace.ops import is_leaf
from qflow.quant.trace.tape import Op, Tape

RELU_TYPES = frozenset(
    {"torch.relu", "torch.relu6", "torch.nn.modules.activation.ReLU", "torch.nn.modules.activation.ReLU6"}
)
# An nn.BatchNorm2d loads the state dict of a subclass or of a frozen batch norm: the names are the same.
PLAIN = "an nn.BatchNorm2d that loads its state dict, and modules for what else it computes"
FOLDED = "; fold_functional_norms=true shows what that gives"


class Fuser:
    """The groups of one tape."""

    def __init__(
        self, tape: Tape, model: nn.Module, fold_functional_norms: bool = False, split: Collection[str] = ()
    ) -> None:
        self.split = split
        self.fold_functional_norms = fold_functional_norms
        self.norms = Counter(op.owner for op in tape.ops if op.kind == OpKind.norm)
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
        if op.kind == OpKind.norm and self.norms[op.owner] > 1:
            return True
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
        elif self.shared(current) and (candidate.kind == OpKind.norm or current.module not in self.split):
            reason = f"{current.name} is a shared module"  # if split, its calls still have one weight to fold into
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
            reason = "" if candidate.statistics and self.fold_functional_norms else self.functional(candidate)
        elif candidate.kind == OpKind.norm:
            module = self.modules[candidate.module or ""]
            if not getattr(module, "track_running_stats", False):
                reason = "a batch norm without running statistics cannot be folded"
        elif candidate.scope != current.scope and "BatchNorm" in self.scope_type(candidate):
            reason = f"{self.scope_type(candidate)} is not recognised as a batch norm: use nn.BatchNorm2d in eval mode"
            if isinstance(self.modules[candidate.scope], nn.modules.batchnorm._BatchNorm):
                reason = f"the forward of {self.scope_type(candidate)} is its own: split it into {PLAIN}"
        else:
            return False
        if reason:
            self.unfused.append((current.name, candidate.module or candidate.scope or candidate.name, reason))
        return not reason

    def functional(self, norm: Op) -> str:
        """Why a functional batch norm is not folded, and how to write it so that it is."""
        if norm.statistics is None:
            return "a functional batch norm owns no module: use nn.BatchNorm2d"
        if is_leaf(self.modules[norm.statistics]):
            return f"F.batch_norm is no module to the plugin: call {norm.statistics}(x) itself{FOLDED}"
        name = type(self.modules[norm.statistics]).__name__
        return f"the F.batch_norm inside {name} is no module to the plugin: split it into {PLAIN}{FOLDED}"

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
