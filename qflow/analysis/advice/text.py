"""Advice as text: what to do, ordered by expected gain, and the effect of following it."""

from __future__ import annotations

from collections.abc import Sequence

from qflow.analysis.measures.advice import Advice, Fidelity
from qflow.analysis.measures.tables import text_table


def advice_text(advice: Sequence[Advice], fidelity: Fidelity | None) -> str:
    """What to do, ordered by expected gain, with the values behind it; then the outputs before and after."""
    if not advice:
        return "Nothing stands out: no operator is much more sensitive than the others.\n"
    parts = []
    for number, a in enumerate(advice, 1):
        values = ", ".join(f"{name} {value:.4g}" for name, value in a.figures)
        parts.append(f"{number}. {a.op}: {a.cause} ({a.source}), {a.gain:.1%} of the sensitivity\n   {a.text}\n")
        parts[-1] += f"   {values}\n" + (f"   '{a.line}'\n" if a.line else "")
    if fidelity is not None:
        rows = [
            [r.op_name, r.sensitive_type, f"{r.before_dtype} -> {r.after_dtype}", f"{r.before:.4g}", f"{r.after:.4g}"]
            for r in fidelity.rows
        ]
        change = f"from {fidelity.before:.4g} to {fidelity.after:.4g} ({fidelity.metric}, all quantizers on)"
        table = text_table(["op_name", "sensitive_type", "dtype", "before", "after"], rows)
        parts.append(f"Following it changes the outputs' distance to float {change}:\n{table}")
        together = [f"All together: '{fidelity.line}'"] if fidelity.line else []
        parts.append("".join(f"{text}\n" for text in (*together, *fidelity.left_out)))
    return "\n".join(parts)
