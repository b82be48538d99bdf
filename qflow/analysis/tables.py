"""The guide's tables as records: standard library only, so that they can be logged and compared anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class BadcaseTable:
    """The worst sample of each output under each metric, and the samples used as bad cases.

    `index[output][metric]` is a position in the calibration data, `value[output][metric]` its distance;
    `worst[metric]` is the worst over all outputs, each compared after division by its mean over the samples, so
    that an output of large numbers does not always win. `chosen` are the bad cases that the analysis runs on.
    """

    samples: int
    index: dict[str, dict[str, int]]
    value: dict[str, dict[str, float]]
    worst: dict[str, int]
    metric: str
    chosen: tuple[int, ...]


@dataclass(frozen=True)
class SensitivityRow:
    """One quantizer switched on alone: how far the outputs move from float.

    `score` is made of `metric` as the table's `merge` says, larger is more sensitive. `sensitive_type` is
    `activation` or `weight`; `flops` are two a multiply-accumulate, for one sample.
    """

    op_name: str
    sensitive_type: str
    op_type: str
    score: float
    quant_dtype: str
    flops: int


@dataclass(frozen=True)
class SensitivityTable:
    """Rows from most to least sensitive (guide's order), `exact` where every row was measured by running it."""

    metric: str
    merge: str
    samples: int
    exact: bool
    rows: tuple[SensitivityRow, ...]

    def activation_scores(self) -> dict[str, float]:
        """Operator -> activation sensitivity, larger is more sensitive."""
        return {row.op_name: row.score for row in self.rows if row.sensitive_type == "activation"}

    def text(self) -> str:
        """The guide's table."""
        header = ("op_name", "sensitive_type", "op_type", self.metric, "quant_dtype")
        body = [(r.op_name, r.sensitive_type, r.op_type, f"{r.score:.6g}", r.quant_dtype) for r in self.rows]
        return text_table(header, body)


@dataclass(frozen=True)
class CheckRow:
    """Requested against applied precision of one operator, with the rule that asked and why the device differs."""

    op: str
    op_type: str
    input_dtype: str
    requested: str
    applied: str
    weight_dtype: str
    weight_axis: int
    observer: str
    rule: str
    reason: str


@dataclass(frozen=True)
class Finding:
    """One line to look at: where, what, and how bad (`info`, `check`, `error`)."""

    op: str
    level: str
    message: str


@dataclass(frozen=True)
class ModelCheck:
    """The guide's model check: structure, call counts, qconfig, findings."""

    march: str
    operators: int
    rows: tuple[CheckRow, ...]
    calls: dict[str, int]
    unfused: tuple[tuple[str, str, str], ...]
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        """Findings that must be mended."""
        return tuple(finding for finding in self.findings if finding.level == "error")


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns under a rule, as the guide prints them."""
    widths = [max(len(str(r[i])) for r in [header, *rows]) for i in range(len(header))]
    lines = ["  ".join(str(c).ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in [header, *rows]]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]]) + "\n"
