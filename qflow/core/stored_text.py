"""Texts from outside, such as the message of a user's exception, in a form that every store takes, or a line shows.

A database and MLflow's HTTP interface hold UTF-8: no lone surrogates (which a file name with foreign bytes has), and in
PostgreSQL no NUL. A text that only one of two stores took would leave them in disagreement.
"""

from __future__ import annotations

REASON = 5000
"""Characters of the reason that a trial or a run ended for: one text for the tracking store and the study database."""
LINE = 1200
"""Characters of a line with a text from outside."""


def stored_text(text: str, most: int | None = None) -> str:
    r"""Return `text` with `\x00` and `\udcff` written out where such characters stand, cut with an ellipsis at `most`.

    The result is its own result: `stored_text(stored_text(x)) == stored_text(x)`.
    """
    if most is not None and len(text) > most:
        text = f"{text[: most - 1]}…"
    clean = text.replace("\x00", "\\x00").encode("utf-8", "backslashreplace").decode("utf-8")
    return clean if most is None or len(clean) <= most else f"{clean[: most - 1]}…"


def printable(text: str, most: int = LINE) -> str:
    r"""Return `text` as a terminal may show it: `\x1b` and other control characters written out, but for line breaks.

    Of a line with more than `most` characters the middle is left out: where it failed stands at the end. Escape
    sequences would change the terminal, and a forged line break would add a line; `one_line` takes those out too.
    """
    return "\n".join(map(lambda line: _shown(line, most), text.split("\n")))


def one_line(text: str, most: int = LINE) -> str:
    """Return `text` in one line, as `printable` does, with single blanks between its words."""
    return _shown(" ".join(text.split()), most)


def _shown(line: str, most: int) -> str:
    if len(line) > most:
        line = f"{line[: most * 2 // 3]} … {line[len(line) - most // 3 :]}"
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line)
