"""Is a sensitivity table healthy? The guide's reading: scores vary strongly and the tail is close to zero.

How close depends on how many rows there are. Where the row of rank r has 1/r of the worst, the median of n rows has
2/(n + 1) of it: near zero of a hundred rows, a third of five. So the median is large above three times that share, and
above TAIL from 23 rows on. An output that is rounded, or chosen, shows otherwise: most errors do not reach it at all,
and most rows are exactly 0, which no row of a continuous output is.
"""

from __future__ import annotations

import math
import statistics

from qflow.analysis.measures.tables import Finding, SensitivityTable

TAIL = 0.25
"""A median row above this share of the worst one is no tail: errors come from everywhere, or from elsewhere."""


def large_tail(rows: int) -> float:
    """The share of the worst row above which the median of so many is large: TAIL, or 6/(n + 1) if that is more."""
    return max(TAIL, 6.0 / (rows + 1))


def health(table: SensitivityTable, infinite_in_float: bool = False) -> tuple[Finding, ...]:
    """Findings that name the likely cause where the table is not what a healthy one looks like.

    Where outputs are `infinite_in_float` already, an infinite score is laid to these.
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
                "Post-processing in the outputs (NMS, argmax, rounding), a single input that spoils all rows, or "
                "nothing that stands out any more?",
            )
        )
    noisy = [r for r in rows[: max(1, len(rows) // 10)] if r.exact and r.score > 0 and r.spread > 2.0 * r.score]
    if noisy:
        found.append(
            ("check", f"{noisy[0].op_name} differs more between bad cases than it matters: take more bad cases")
        )
    return tuple(Finding("sensitivity", level, text) for level, text in found)
