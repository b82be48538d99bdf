"""A page of headings, sentences and tables: comparisons of trials."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from qflow.report.page import _document, _table


@dataclass(frozen=True)
class Part:
    """A heading with its sentences and a table; without rows there is no table."""

    heading: str
    sentences: Sequence[str]
    header: Sequence[str] = ()
    rows: Sequence[Sequence[str]] = ()


def table_page(path: Path, title: str, parts: Sequence[Part]) -> None:
    """Write the page; all texts are plain and are escaped here. The first column of a table holds names."""
    texts = []
    for part in parts:
        texts.append(f"<h2>{escape(part.heading)}</h2>")
        texts += [f"<p>{escape(sentence)}</p>" for sentence in part.sentences]
        if part.rows:
            rows = [[("name" if i == 0 else "", escape(cell)) for i, cell in enumerate(row)] for row in part.rows]
            texts.append(_table(part.header, rows))
    path.write_text(_document(title, texts), encoding="utf-8")
