"""The guide's tables as dataclasses; they need the standard library only, so that any program can read them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from qflow.core.shown import Shown, View

LISTED = 4  # operators that a finding names after its first
BADCASE_COLUMNS = ("output", "metric", "worst sample", "value")
LAYER_COLUMNS = ("mod_name", "quant_dtype", "qscale", "error", "single_error", "Cosine", "L1", "SQNR")
"""Columns that a notebook shows."""


@dataclass(frozen=True, repr=False)
class BadcaseTable(Shown):
    """The worst sample of each output under each metric, and the samples used as bad cases.

    `index[output][metric]` is a position in the calibration data, `value[output][metric]` its distance, and
    `top[output][metric]` the worst few as (position, distance), worst first. `worst[metric]` is the worst over all
    outputs, each compared after division by its mean over the samples, so that an output of large numbers does not
    always win; `worst_raw[metric]` is the plugin's choice, which compares the plain numbers. `chosen` are the bad
    cases that the analysis runs on, worst first under `metric`. A NaN distance is stored as the worst infinity;
    `findings` count these, and name the outputs that were left out and whatever makes the comparison doubtful.

    For a model with state, samples are frames; `sequences` pairs the number of frames of each sequence with the number
    of sequences that ran in parallel.
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
    sequences: tuple[tuple[int, int], ...] = ()

    def frame(self, sample: int) -> tuple[int, int] | None:
        """Sequence and frame of a sample, both from 0; None for samples that are not frames."""
        before = 0
        for count, parallel in self.sequences:
            if sample < count * parallel:
                return before + sample % parallel, sample // parallel
            sample, before = sample - count * parallel, before + parallel
        return None

    def shown(self, sample: int) -> str:
        """A sample in a text: its position, or `sequence:frame`."""
        frame = self.frame(sample)
        return str(sample) if frame is None else f"{frame[0]}:{frame[1]}"

    def view(self) -> View:
        """Return the worst sample of each output under each metric."""
        chosen = ", ".join(map(self.shown, self.chosen))
        found = [(output, metric, i) for output, metrics in self.index.items() for metric, i in metrics.items()]
        rows = [(output, metric, self.shown(i), self.value[output][metric]) for output, metric, i in found]
        return View(f"{self.samples} samples, the worst by {self.metric}: {chosen}", BADCASE_COLUMNS, rows)


@dataclass(frozen=True)
class LayerRow:
    """One operator call, float (base) against calibrated (analy) on the same input; the columns are the guide's.

    Metrics compare the two accumulated values; they are None where they do not apply (shapes that differ, inner members
    of a fused group, integer results). `max_atol_diff` is Atol, and `max_qscale_diff` is Atol / qscale, the number of
    quantization steps. `error` and `single_error` are qflow's own columns. `quantizer` is the operator whose quantizer
    acts on the result of this call ("" inside a fused group or without a quantizer).
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
    """The same for the operator alone: run on its float inputs with its own quantizers on."""

    @property
    def operator(self) -> str:
        """The operator of the qconfig whose value this is; a member inside a fused group keeps its own name."""
        return self.quantizer or self.mod_name


@dataclass(frozen=True, repr=False)
class LayerTable(Shown):
    """All operator calls in the order of the model. `start` is the first operator where the error grows, or ""."""

    samples: int
    rows: tuple[LayerRow, ...]
    start: str = ""
    findings: tuple[Finding, ...] = ()

    def view(self) -> View:
        """Return the calls with their errors, in the order of the model."""
        rows = [[getattr(row, name) for name in LAYER_COLUMNS] for row in self.rows]
        start = f", the error starts to grow at {self.start}" if self.start else ""
        return View(f"{len(self.rows)} operator calls on {self.samples} samples{start}", LAYER_COLUMNS, rows)


@dataclass(frozen=True)
class SensitivityRow:
    """One quantizer switched on alone: how far the outputs move from float.

    `score` is computed from `metric` as the table's `merge` describes; larger is more sensitive. `sensitive_type` is
    `activation` or `weight`; `flops` counts two per multiply-accumulate, for one sample. `spread` is the standard
    deviation of the score over the bad cases. Rows that are `exact` were measured, others are estimated. `outputs`
    holds the plugin's raw metric of each output as (output, value); it is empty in estimated rows.
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


@dataclass(frozen=True, repr=False)
class SensitivityTable(Shown):
    """Rows from most to least sensitive (guide's order); `exact` is true if every row was measured.

    `method` describes how the scores were obtained; `findings` name what makes the table doubtful.
    """

    metric: str
    merge: str
    samples: int
    exact: bool
    rows: tuple[SensitivityRow, ...]
    method: str = "one quantizer on at a time, full forwards"
    findings: tuple[Finding, ...] = ()
    flops: int = 0
    """Of the whole model, for one sample."""

    def activation_scores(self, dtype: str | None = None) -> dict[str, float]:
        """Operator, or value inside one, -> activation sensitivity at `dtype` (by default its lowest)."""
        return self._scores("activation", dtype)

    def weight_scores(self, dtype: str | None = None) -> dict[str, float]:
        """Operator -> weight sensitivity at `dtype` (by default its lowest)."""
        return self._scores("weight", dtype)

    def _scores(self, kind: str, dtype: str | None) -> dict[str, float]:
        found: dict[str, float] = {}
        for at in [dtype] if dtype else self.dtypes:
            for r in self.rows:
                if r.sensitive_type == kind and r.quant_dtype == at:
                    found.setdefault(r.op_name, r.score)
        return found

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Candidate dtypes that were measured, lowest precision first."""
        known = ("qint8", "qint16", "float16")
        return tuple(sorted({r.quant_dtype for r in self.rows}, key=lambda d: known.index(d) if d in known else 9))

    def by_quantizer(self) -> list[SensitivityRow]:
        """Rows grouped by quantizer, the most sensitive quantizer first and NaN scores last."""
        groups: dict[tuple[str, str], list[SensitivityRow]] = {}
        for row in sorted(self.rows, key=lambda r: -r.score if r.score == r.score else math.inf):
            groups.setdefault((row.op_name, row.sensitive_type), []).append(row)
        return [row for group in groups.values() for row in group]

    @property
    def score_name(self) -> str:
        """Name of the merged score: the metric, converted so that larger is worse."""
        return {"Cosine": "1-Cosine", "SQNR": "noise/signal"}.get(self.metric, self.metric)

    def text(self) -> str:
        """The guide's table, with a column `exact` if some rows are estimated."""
        header = ["op_name", "sensitive_type", "op_type", self.score_name, "quant_dtype"]
        body = [[r.op_name, r.sensitive_type, r.op_type, f"{r.score:.6g}", r.quant_dtype] for r in self.rows]
        if not self.exact:
            header.append("exact")
            body = [[*cells, "yes" if r.exact else "estimate"] for cells, r in zip(body, self.rows, strict=True)]
        return text_table(header, body)

    def view(self) -> View:
        """Return the rows, the most sensitive first."""
        header = ("op_name", "sensitive_type", "quant_dtype", self.score_name)
        rows = [(r.op_name, r.sensitive_type, r.quant_dtype, r.score) for r in self.rows]
        first = f", most sensitive: {self.rows[0].op_name}" if self.rows else ""
        return View(f"{len(rows)} quantizers by {self.metric} on {self.samples} samples{first}", header, rows)


@dataclass(frozen=True)
class CheckRow:
    """Requested and applied precision of one operator, the rule that requested it, and why the device differs."""

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
    fused: str = ""
    """Operators of the float model that are part of this one, in order; their own names stand only here."""


@dataclass(frozen=True)
class Finding:
    """A remark for the user: the operator, the level (`info`, `check`, `error`) and the message."""

    op: str
    level: str
    message: str


@dataclass(frozen=True, repr=False)
class ModelCheck(Shown):
    """The guide's model check: structure, call counts, qconfig, findings."""

    march: str
    operators: int
    """Number of operators (ModelGraph.n_operators); `rows` has one row for each."""
    rows: tuple[CheckRow, ...]
    calls: dict[str, int]
    unfused: tuple[tuple[str, str, str], ...]
    findings: tuple[Finding, ...]

    @property
    def errors(self) -> tuple[Finding, ...]:
        """Findings of level `error`."""
        return tuple(finding for finding in self.findings if finding.level == "error")

    def view(self) -> View:
        """Return the findings; `rows` has the precisions."""
        notable = sum(finding.level != "info" for finding in self.findings)
        title = f"{self.operators} operators on {self.march}, {notable} findings to look at, {len(self.errors)} errors"
        return View(title, ("operator", "level", "finding"), [(f.op, f.level, f.message) for f in self.findings])


def text_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned columns under a rule, as the guide prints them."""
    widths = [max(len(str(r[i])) for r in [header, *rows]) for i in range(len(header))]
    lines = ["  ".join(str(c).ljust(w) for c, w in zip(r, widths, strict=True)).rstrip() for r in [header, *rows]]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]]) + "\n"


def also(others: Sequence[str]) -> str:
    """Return what a finding says of further operators that it holds for: ` (2 more: neck.a, neck.b)`, or ""."""
    listed = f"{', '.join(others[:LISTED])}{', ...' * (len(others) > LISTED)}"
    return f" ({len(others)} more: {listed})" if others else ""
