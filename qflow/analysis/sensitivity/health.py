"""Checks whether a sensitivity table is plausible. By the guide, scores vary strongly and the tail is close to zero.

How close the tail is to zero depends on the number of rows. If the row of rank r has 1/r of the worst score, the median
of n rows has 2/(n + 1) of it: near zero for a hundred rows, a third for five. The median therefore counts as large
above three times that share, and above TAIL from 23 rows on. Outputs that are rounded or selected (NMS, argmax) give
another picture: most errors do not reach them at all, so that most scores are exactly 0, which does not happen with a
continuous output.
"""

from __future__ import annotations

import math
import statistics

from qflow.analysis.measures.tables import Finding, SensitivityTable

TAIL = 0.25
"""Share of the worst score above which the median is large: no operator stands out, or the outputs are unsuitable."""


def large_tail(rows: int) -> float:
    """Share of the worst score above which the median of so many rows is large: TAIL, or 6/(rows + 1) if larger."""
    return max(TAIL, 6.0 / (rows + 1))


def health(table: SensitivityTable, infinite_in_float: bool = False) -> tuple[Finding, ...]:
    """Findings that name the likely cause if the table is not plausible.

    If outputs are infinite in the float model (`infinite_in_float`), infinite scores are attributed to these outputs.
    """
    rows = [r for r in table.rows if r.quant_dtype == table.dtypes[0]] if table.rows else []
    scores = [row.score for row in rows]
    found: list[tuple[str, str]] = []
    infinite = [row.op_name for row in rows if math.isinf(row.score)]
    if infinite and infinite_in_float:
        text = "infinities of the float outputs become other values with"
        found.append(("error", f"{text} {', '.join(infinite[:3])} quantized: cut the model before them"))
    elif infinite:
        found.append(("error", f"outputs are not finite with {', '.join(infinite[:3])} quantized: look for a mask"))
    finite = [s for s in scores if math.isfinite(s)]
    if len(finite) >= 4 and max(finite) == 0.0:
        found.append(("error", "every score is 0: the outputs do not depend on any quantizer, or are rounded"))
    elif len(finite) >= 4 and 2 * finite.count(0.0) > len(finite):
        zeros = f"{finite.count(0.0)} of {len(finite)} scores are 0"
        found.append(("check", f"{zeros}: outputs that are rounded or chosen (NMS, argmax) hide small errors"))
    elif len(finite) >= 8 and statistics.median(finite) > large_tail(len(finite)) * max(finite):
        found.append(
            (
                "check",
                f"the tail is large: the median is {statistics.median(finite) / max(finite):.0%} of the worst row. "
                "Likely causes: post-processing in the outputs (NMS, argmax, rounding), a single input that spoils all "
                "rows, or no operator that stands out any more",
            )
        )
    noisy = [r for r in rows[: max(1, len(rows) // 10)] if r.exact and r.score > 0 and r.spread > 2.0 * r.score]
    if noisy:
        text = f"the score of {noisy[0].op_name} varies by more than twice its mean: take more bad cases"
        found.append(("check", text))
    return tuple(Finding("sensitivity", level, text) for level, text in found)
