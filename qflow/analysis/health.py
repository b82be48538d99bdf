"""Is a sensitivity table healthy? The guide's reading: scores vary strongly and the tail is close to zero."""

from __future__ import annotations

import math
import statistics

from qflow.analysis.tables import Finding, SensitivityTable

TAIL = 0.25
"""A median row above this share of the worst one is no tail: errors come from everywhere, or from elsewhere."""


def health(table: SensitivityTable) -> tuple[Finding, ...]:
    """Findings that name the likely cause where the table is not what a healthy one looks like."""
    rows = [r for r in table.rows if r.quant_dtype == table.dtypes[0]] if table.rows else []
    scores = [row.score for row in rows]
    found: list[tuple[str, str]] = []
    infinite = [row.op_name for row in rows if math.isinf(row.score)]
    if infinite:
        found.append(("error", f"outputs are not finite with {', '.join(infinite[:3])} quantized: look for a mask"))
    finite = [s for s in scores if math.isfinite(s)]
    if len(finite) >= 4 and max(finite) == 0.0:
        found.append(("error", "every score is 0: the outputs do not depend on any quantizer, or are rounded"))
    elif len(finite) >= 8 and statistics.median(finite) > TAIL * max(finite):
        found.append(
            (
                "check",
                f"the tail is large: the median is {statistics.median(finite) / max(finite):.0%} of the worst row. "
                "Post-processing in the outputs (NMS, argmax, rounding), or a single input that spoils all rows?",
            )
        )
    noisy = [r for r in rows[: max(1, len(rows) // 10)] if r.exact and r.score > 0 and r.spread > 2.0 * r.score]
    if noisy:
        found.append(
            ("check", f"{noisy[0].op_name} differs more between bad cases than it matters: take more bad cases")
        )
    return tuple(Finding("sensitivity", level, text) for level, text in found)
