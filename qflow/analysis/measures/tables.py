"""The guide's tables as records: standard library only, so that they can be logged and compared anywhere."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(frozen=True)
class BadcaseTable:
    """The worst sample of each output under each metric, and the samples used as bad cases.

    `index[output][metric]` is a position in the calibration data, `value[output][metric]` its distance, and
    `top[output][metric]` the worst few as (position, distance), worst first. `worst[metric]` is the worst over all
    outputs, each compared after division by its mean over the samples, so that an output of large numbers does not
    always win; `worst_raw[metric]` is the plugin's, which compares the numbers as they are. `chosen` are the bad
    cases that the analysis runs on, worst first under `metric`. A distance that is not a number stands as the worst
    infinity; `findings` count them, and name what was left out or makes the comparison doubtful.
    """

    samples: int
    index: dict[str, dict[str, int]]
    value: dict[str, dict[str, float]]
    worst: dict[str, int]
    metric: str
    chosen: tuple[int, ...]
    top: dict[str, dict[str, tuple[tuple[int, float], ...]]] = field(default_factory=dict)
    worst_raw: dict[str, int] = field(default_factory=dict)
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True)
class LayerRow:
    """One operator call, float (base) against calibrated (analy) on the same input; the columns are the guide's.

    Metrics compare the two accumulated values; None where they do not apply (another shape, inner members of a
    fused group, integer results). `max_atol_diff` is Atol and `max_qscale_diff` Atol / qscale: quantization steps.
    `single_*` are ours: the operator alone, its float inputs through its own quantizers, against its float result.
    `quantizer` names the operator whose row this call decides ("" inside a fused group or without a quantizer).
    """

    index: int
    mod_name: str
    base_op_type: str
    analy_op_type: str
    shape: tuple[int, ...]
    quant_dtype: str
    qscale: float | None
    Cosine: float | None
    MSE: float | None
    L1: float | None
    KL: float | None
    SQNR: float | None
    Atol: float | None
    Rtol: float | None
    base_model_min: float | None
    analy_model_min: float | None
    base_model_max: float | None
    analy_model_max: float | None
    base_model_mean: float | None
    analy_model_mean: float | None
    base_model_var: float | None
    analy_model_var: float | None
    max_atol_diff: float | None
    max_qscale_diff: float | None
    quantizer: str
    error: float | None
    """Accumulated error: |base - analy| / |base|, Euclidean norms."""
    single_error: float | None
    """The same for the operator alone."""


@dataclass(frozen=True)
class LayerTable:
    """All operator calls in the order of the model. `start` is the first operator where the error grows (or "")."""

    samples: int
    rows: tuple[LayerRow, ...]
    start: str = ""
    findings: tuple[Finding, ...] = ()


@dataclass(frozen=True)
class SensitivityRow:
    """One quantizer switched on alone: how far the outputs move from float.

    `score` is made of `metric` as the table's `merge` says, larger is more sensitive. `sensitive_type` is
    `activation` or `weight`; `flops` are two a multiply-accumulate, for one sample. `spread` is the standard
    deviation of the score over the bad cases. `exact` rows were measured by running them, others are estimated.
    `outputs` holds for each output the plugin's raw metric (output, value); empty in estimated rows.
    """

    op_name: str
    sensitive_type: str
    op_type: str
    score: float
    quant_dtype: str
    flops: int
    spread: float = 0.0
    exact: bool = True
    outputs: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class SensitivityTable:
    """Rows from most to least sensitive (guide's order), `exact` where every row was measured by running it.

    `method` says how in words; `findings` what makes the table doubtful.
    """

    metric: str
    merge: str
    samples: int
    exact: bool
    rows: tuple[SensitivityRow, ...]
    method: str = "one quantizer on at a time, full forwards"
    findings: tuple[Finding, ...] = ()
    flops: int = 0
    """Of the whole model, one sample."""

    def activation_scores(self, dtype: str | None = None) -> dict[str, float]:
        """Operator -> activation sensitivity at `dtype` (the lowest in the table), larger is more sensitive."""
        return self._scores("activation", dtype)

    def weight_scores(self, dtype: str | None = None) -> dict[str, float]:
        """Operator -> weight sensitivity at `dtype` (the lowest in the table)."""
        return self._scores("weight", dtype)

    def _scores(self, kind: str, dtype: str | None) -> dict[str, float]:
        found = dtype or self.dtypes[0] if self.rows else ""
        return {r.op_name: r.score for r in self.rows if r.sensitive_type == kind and r.quant_dtype == found}

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Candidate dtypes that were measured, lowest precision first."""
        known = ("qint8", "qint16", "float16")
        return tuple(sorted({r.quant_dtype for r in self.rows}, key=lambda d: known.index(d) if d in known else 9))

    def by_quantizer(self) -> list[SensitivityRow]:
        """The most sensitive first, each followed by its rows at other dtypes; what is no number last."""
        groups: dict[tuple[str, str], list[SensitivityRow]] = {}
        for row in sorted(self.rows, key=lambda r: -r.score if r.score == r.score else math.inf):
            groups.setdefault((row.op_name, row.sensitive_type), []).append(row)
        return [row for group in groups.values() for row in group]

    @property
    def score_name(self) -> str:
        """What the merged score is: the metric, turned so that larger is worse."""
        return {"Cosine": "1-Cosine", "SQNR": "noise/signal"}.get(self.metric, self.metric)

    def text(self) -> str:
        """The guide's table; a column `exact` where some rows are estimated."""
        header = ["op_name", "sensitive_type", "op_type", self.score_name, "quant_dtype"]
        body = [[r.op_name, r.sensitive_type, r.op_type, f"{r.score:.6g}", r.quant_dtype] for r in self.rows]
        if not self.exact:
            header.append("exact")
            body = [[*cells, "yes" if r.exact else "estimate"] for cells, r in zip(body, self.rows, strict=True)]
        return text_table(header, body)


@dataclass(frozen=True)
class Advice:
    """What to do about one operator: the cause, the figures it was judged by, and the line that would apply it.

    `gain` is the share of the whole sensitivity (all rows summed) that the advice addresses.
    """

    op: str
    cause: str
    """`truncation`, `rounding`, `shared module`, `known range`, `dual int16`, `constant`, `huge mask value` or
    `calibration data`."""
    source: str
    """`input`, `weight`, `activation`, or `weight and activation`."""
    figures: tuple[tuple[str, float], ...]
    text: str
    line: str
    """An override for a door (`qconfig.modules={head: qint16}`), or "" where the float model must change."""
    gain: float
    target: str = ""
    """Which operator the line sets, and to what: `head`, `qint16`."""
    spec: str = ""


@dataclass(frozen=True)
class FidelityRow:
    """A promoted quantizer before and after: its dtype, its sensitivity, and the error of its operator alone."""

    op_name: str
    sensitive_type: str
    before_dtype: str
    after_dtype: str
    before: float
    after: float


@dataclass(frozen=True)
class Fidelity:
    """What following the advice does: each promoted quantizer, and the outputs with all quantizers on.

    `before` and `after` are the merged distance of the outputs from float on the bad cases, in the table's metric.
    """

    metric: str
    rows: tuple[FidelityRow, ...]
    before: float
    after: float
    line: str = ""
    """The override that follows all that was followed."""
    left_out: tuple[str, ...] = ()
    """Advice that the device does not allow beside the rest, with the reason."""


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
