"""Texts from outside, such as the message of a user's exception, in a form that every store takes.

A database and MLflow's HTTP interface hold UTF-8: no lone surrogates (which a file name with foreign bytes has), and in
PostgreSQL no NUL. A text that only one of two stores took would leave them in disagreement.
"""

from __future__ import annotations

REASON = 5000
"""Characters of the reason that a trial or a run ended for: one text for the tracking store and the study database."""


def stored_text(text: str, most: int | None = None) -> str:
    r"""Return `text` with `\x00` and `\udcff` written out where such characters stand, cut with an ellipsis at `most`.

    The result is its own result: `stored_text(stored_text(x)) == stored_text(x)`.
    """
    if most is not None and len(text) > most:
        text = f"{text[: most - 1]}…"
    clean = text.replace("\x00", "\\x00").encode("utf-8", "backslashreplace").decode("utf-8")
    return clean if most is None or len(clean) <= most else f"{clean[: most - 1]}…"
