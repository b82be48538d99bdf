"""Advice on operators, and what following it gave, as dataclasses; they need the standard library only."""

from __future__ import annotations

from dataclasses import dataclass

from qflow.core.shown import Shown, View


@dataclass(frozen=True)
class Advice:
    """What to do about one operator: the cause, the values behind it (`figures`), and the override that applies it.

    `gain` is the share of the whole sensitivity (all rows summed) that the advice addresses.
    """

    op: str
    cause: str
    """`truncation`, `rounding`, `shared module`, `known range`, `dual int16`, `constant`, `huge mask value`,
    `calibration data` or `values inside`."""
    source: str
    """`input`, `weight`, `activation`, or `weight and activation`."""
    figures: tuple[tuple[str, float], ...]
    text: str
    line: str
    """A command-line override (`qconfig.modules={head: qint16}`), or "" if the float model must change."""
    gain: float
    target: str = ""
    """The operator that the line sets: `head`."""
    spec: str = ""
    """The precision that the line sets it to: `qint16`."""


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
    """The effect of following the advice: each promoted quantizer, and the outputs with all quantizers on.

    `before` and `after` are the merged distance of the outputs from float on the bad cases, in the table's metric.
    """

    metric: str
    rows: tuple[FidelityRow, ...]
    before: float
    after: float
    line: str = ""
    """One override that applies all the advice that was followed."""
    left_out: tuple[str, ...] = ()
    """Advice that the device does not allow together with the rest, with the reason."""


class AdviceList(tuple[Advice, ...], Shown):
    """Advice in order of the expected gain; a notebook shows it as a table."""

    __repr__ = Shown.__repr__

    def view(self) -> View:
        """Return what to do for each operator, with the line that does it."""
        first = f", first {self[0].op}: {self[0].cause}" if self else ""
        header = ("operator", "what to do", "override", "cause", "share of sensitivity")
        return View(
            f"{len(self)} operators stand out{first}", header, [(a.op, a.text, a.line, a.cause, a.gain) for a in self]
        )
