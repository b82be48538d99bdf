"""One search for bad cases: takes in one batch after the other, picks comparable outputs, and collects findings."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from qflow.analysis.badcases.looks import INPUT, Looks, Seen
from qflow.analysis.badcases.worst_samples import WorstSamples
from qflow.analysis.measures.metrics import Custom, smallest_is_worst
from qflow.analysis.measures.tables import BadcaseTable, Finding
from qflow.core.errors import DataError
from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.trace.calling import cut
from qflow.quant.trace.order import Jump, Order, jumps
from qflow.quant.trace.tape import Tape
from qflow.quant.trace.trace import trace

NAMED = 4  # samples or outputs that a message lists


@dataclass
class Search:
    """State of a running search; `pool` and `top` are those of `WorstSamples`."""

    model: nn.Module
    prepared: QuantizedModel
    custom: Custom | None
    top: int
    pool: int
    worst: WorstSamples | None = None
    left_out: dict[str, str] = field(default_factory=dict)
    """Output -> why it is not compared."""
    findings: list[Finding] = field(default_factory=list)
    """About the model."""
    order: Order = field(default_factory=Order)
    nan: dict[str, list[int]] = field(default_factory=dict)
    """Where the float model has NaN ("the input", "output 0") -> number of samples, followed by the first of them."""
    makers: dict[str, str] = field(default_factory=dict)
    """Output -> the operator that gives it."""

    def __post_init__(self) -> None:
        self.looks = Looks(self.model, self.prepared, self.custom)
        if self.looks.other_weights:
            message = "topk, sort and the like do not follow the float order: the float model has other parameters"
            self.findings.append(Finding("", "check", message))

    @property
    def samples(self) -> int:
        return 0 if self.worst is None else self.worst.samples

    def add(self, batch: Any, size: int) -> None:
        """Run both models on one batch and take in the distances of its samples."""
        if self.worst is None:
            tape = trace(self.model, cut(batch, size, 0, 2), self.prepared.plan.skipped)
            self.makers = {name: tape.ops[index].name for name, index in tape.outputs}
            self.findings += _jump_findings(self.model, tape)
        self.take(self.looks.look(batch, size))

    def take(self, seen: Seen) -> None:
        """Take in a look at the next batch. The first batch decides which outputs are compared."""
        if self.worst is None:
            self.worst = WorstSamples(list(seen.rows), self.custom, self.top, self.pool)
        for name, why in seen.refused.items():
            self.leave_out(name, why)
        for name in seen.rows.keys() - self.left_out.keys() - set(self.worst.outputs):
            self.left_out[name] = "it is not in the first batch"
        for name in set(self.worst.outputs) - seen.rows.keys():
            self.leave_out(name, "it is not in every batch")
        if not self.worst.outputs:
            raise self.nothing_left()
        self.order.followed |= set(seen.followed)
        self.order.strayed |= set(seen.strayed)
        self.note_nan(seen)
        self.worst.update(torch.stack([seen.rows[name] for name in self.worst.outputs]))

    def leave_out(self, name: str, why: str) -> None:
        """Compare an output no more, and keep the reason unless there is one already."""
        assert self.worst is not None
        self.left_out.setdefault(name, f"{why} ({self.makers[name]} makes it)" if name in self.makers else why)
        if name in self.worst.outputs:
            self.worst.leave_out(name)

    def nothing_left(self) -> DataError:
        """The error for a model none of whose outputs can be compared."""
        reasons = [f"output {name}: {why}" for name, why in self.left_out.items()]
        more = f"; and {len(reasons) - NAMED} more" if len(reasons) > NAMED else ""
        first = next((self.makers[name] for name in self.left_out if name in self.makers), "what makes them")
        return DataError(
            "Bad cases are found by comparing float outputs per sample, but got none: "
            f"{'; '.join(reasons[:NAMED]) or 'the model gives no tensor'}{more}. Cut the model before {first}, or give "
            "float outputs with one row a sample."
        )

    def note_nan(self, seen: Seen) -> None:
        """Count the samples of this batch whose inputs contain NaN, and the others whose compared outputs do."""
        assert self.worst is not None
        for what in (INPUT, *(f"output {name}" for name in self.worst.outputs)):
            for i in seen.nan.get(what, ()):
                known = self.nan.setdefault(what, [0])
                known[0] += 1
                if len(known) <= NAMED:
                    known.append(self.samples + i)

    def wanted(self, metric: str, count: int, compare: str) -> set[int]:
        """Samples whose inputs may be needed: all that are worst so far, and twice as many as will be chosen."""
        worst = self.worst
        if worst is None:
            return set()
        found = {worst.tops(name, m)[0][0] for name in worst.outputs for m in worst.metrics}
        found |= {i for m in worst.metrics for i in (*worst.fair(m, 1)[0], *worst.raw(m, 1))}
        return found | set(worst.raw(metric, count) if compare == "raw" else worst.fair(metric, 2 * count)[0])

    def table(self, metric: str, count: int, compare: str, top: int) -> BadcaseTable:
        """The table of the samples seen so far. Raises DataError without data."""
        worst = self.worst
        if worst is None:
            raise DataError("Bad cases are found by comparing outputs on data, but got no batch. Check the data.")
        chosen, certain = worst.fair(metric, count)
        if compare == "raw":
            chosen = worst.raw(metric, count)
            certain = len(chosen)
        tops = {
            n: {m: tuple((i, self.shown(m, v)) for i, v in worst.tops(n, m)[:top]) for m in worst.metrics}
            for n in worst.outputs
        }
        return BadcaseTable(
            samples=worst.samples,
            index={n: {m: rows[0][0] for m, rows in row.items()} for n, row in tops.items()},
            value={n: {m: rows[0][1] for m, rows in row.items()} for n, row in tops.items()},
            worst={m: worst.fair(m, 1)[0][0] for m in worst.metrics},
            metric=metric,
            chosen=tuple(chosen),
            top=tops,
            worst_raw={m: worst.raw(m, 1)[0] for m in worst.metrics},
            findings=tuple([*self.findings, *self.data_findings(certain, len(chosen))]),
        )

    def shown(self, metric: str, value: float) -> float:
        """`value` for a table, which holds no NaN: NaN becomes the worst infinity."""
        if not math.isnan(value):
            return value
        return -math.inf if smallest_is_worst(metric, self.custom) else math.inf

    def data_findings(self, certain: int, chosen: int) -> list[Finding]:
        """Findings on the outputs and samples of the batches so far."""
        assert self.worst is not None
        found = [Finding(n, "info", f"output {n} is not compared: {why}") for n, why in self.left_out.items()]
        found += [
            Finding(c, "info", f"{c} changes the order of values: compared in the order of the float model")
            for c in sorted(self.order.followed)
        ]
        found += [
            Finding(c, "check", f"{c} cannot use the float order (its values differ in shape): cut the model before it")
            for c in sorted(self.order.strayed)
        ]
        for name in self.worst.outputs:
            missing = self.worst.not_finite(name)
            if missing:
                most = max(number for number, _ in missing.values())
                message = (
                    f"output {name}: {most} of {self.worst.samples} samples have no finite {', '.join(missing)}, first "
                    f"sample {min(i for _, i in missing.values())}: they count as worst. {self.causes(name, most)}"
                )
                found.append(Finding(name, "check", message))
        if certain < chosen:
            message = f"{certain} of the {chosen} chosen samples are certain, the others nearly as bad. Raise pool."
            found.append(Finding("", "info", message))
        return found

    def causes(self, name: str, most: int) -> str:
        """Why `most` samples have no finite distance: NaN in the float model, or something else."""
        own = {"The input itself": self.nan.get(INPUT), "The float output itself": self.nan.get(f"output {name}")}
        there = {what: known for what, known in own.items() if known}
        causes = []
        for what, (count, *first) in there.items():
            more = f" and {count - len(first)} more" if count > len(first) else ""
            causes.append(f"{what} is NaN in samples {', '.join(map(str, first))}{more}: clean the data.")
        if most > sum(known[0] for known in there.values()):
            causes.append("Look for overflow or masks.")
        return " ".join(causes)

    def state_dict(self, step: int) -> dict[str, Any]:
        """Everything that the next steps need."""
        assert self.worst is not None
        return {
            "step": step,
            "worst": self.worst.state_dict(),
            "left_out": dict(self.left_out),
            "nan": {what: list(known) for what, known in self.nan.items()},
            "findings": [(f.op, f.level, f.message) for f in self.findings],
            "followed": sorted(self.order.followed),
            "strayed": sorted(self.order.strayed),
        }

    def resume(self, state: dict[str, Any] | None) -> int:
        """Continue from `state`; returns the number of finished steps."""
        if state is None:
            return 0
        self.worst = WorstSamples([], self.custom, self.top, self.pool)
        self.worst.load_state_dict(state["worst"])
        self.left_out = dict(state["left_out"])
        self.nan = {what: list(known) for what, known in state.get("nan", {}).items()}
        self.findings = [Finding(*row) for row in state["findings"]]
        self.order = Order(followed=set(state["followed"]), strayed=set(state["strayed"]))
        return int(state["step"])


def _all_torch(module: nn.Module) -> bool:
    """True for a module that consists of torch's own modules, none of which has jumps in its output."""
    jump = (nn.Hardshrink, nn.Threshold)
    return all(type(p).__module__.startswith("torch.nn.modules.") and not isinstance(p, jump) for p in module.modules())


def _jump_findings(model: nn.Module, tape: Tape) -> list[Finding]:
    """One finding for each operator that makes outputs incomparable."""
    by_op: dict[str, list[Jump]] = {}
    for jump in jumps(tape):
        if jump.skipped and _all_torch(model.get_submodule(jump.skipped)):
            continue
        by_op.setdefault(jump.op, []).append(jump)
    found = []
    for op, rows in by_op.items():
        outputs = ", ".join(jump.output for jump in rows)
        kind = rows[0].op_type.rpartition(".")[2]
        what = "makes small errors jump"
        if not rows[0].known:
            what = f"is {'skipped' if rows[0].skipped else 'unknown'}, and incomparable if it is like NMS"
        found.append(Finding(op, "check", f"{kind} before output {outputs} {what}: cut the model before it"))
    return found
