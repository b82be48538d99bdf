"""Advice as text: what to do, by expected gain, and what following it did."""

from __future__ import annotations

from collections.abc import Sequence

from qflow.analysis.measures.tables import Advice, Fidelity, text_table


def advice_text(advice: Sequence[Advice], fidelity: Fidelity | None) -> str:
    """What to do, by expected gain, with the figures it was judged by; then before and after."""
    if not advice:
        return "Nothing stands out: no operator is sensitive beyond the others.\n"
    parts = []
    for number, a in enumerate(advice, 1):
        figures = ", ".join(f"{name} {value:.4g}" for name, value in a.figures)
        parts.append(f"{number}. {a.op}: {a.cause} ({a.source}), {a.gain:.1%} of the sensitivity\n   {a.text}\n")
        parts[-1] += f"   {figures}\n" + (f"   '{a.line}'\n" if a.line else "")
    if fidelity is not None:
        rows = [
            [r.op_name, r.sensitive_type, f"{r.before_dtype} -> {r.after_dtype}", f"{r.before:.4g}", f"{r.after:.4g}"]
            for r in fidelity.rows
        ]
        moved = f"{fidelity.before:.4g} to {fidelity.after:.4g} off float ({fidelity.metric}, all quantizers on)"
        table = text_table(["op_name", "sensitive_type", "dtype", "before", "after"], rows)
        parts.append(f"Followed, the outputs move from {moved}:\n{table}")
        together = [f"All together: '{fidelity.line}'"] if fidelity.line else []
        parts.append("".join(f"{text}\n" for text in (*together, *fidelity.left_out)))
    return "\n".join(parts)
