"""The page that all reports of qflow share: one HTML file with header, contents, sections, tables, charts and pictures.

Everything is in the file: it opens without a network, and its Content-Security-Policy lets it load nothing and run no
script but its own. Texts are escaped here; a name that ends in `_html` holds HTML already.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from html import escape
from importlib.resources import files
from pathlib import Path
from typing import Any, TypeAlias

SCRIPTS = ("charts.js", "network.js", "page.js")  # in the order in which they use each other
Cell: TypeAlias = tuple[str, str]
"""(class, HTML) of a cell."""


@dataclass(frozen=True)
class Section:
    """A part of the page: its heading, which the contents list too, and its HTML."""

    title: str
    body_html: str

    @property
    def place(self) -> str:
        """Its address on the page, as long as no earlier section has the same."""
        return "".join(c if c.isalnum() else "-" for c in self.title.lower()).strip("-")


def document(title: str, subtitle: str, sections: Sequence[Section]) -> str:
    """Return the whole page as text."""
    style, script = _asset("page.css"), "\n".join(["(() => {", *map(_asset, SCRIPTS), "})();"])
    policy = (
        f"default-src 'none'; script-src '{_hash(script)}'; style-src '{_hash(style)}'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    before = [[s.place for s in sections[:i]].count(section.place) for i, section in enumerate(sections)]
    placed = [(f"{s.place}-{n}" if n else s.place, s) for s, n in zip(sections, before, strict=True)]
    links = "".join(f'<a href="#{place}">{escape(s.title)}</a>' for place, s in placed)
    body = "\n".join(
        f'<section id="{place}"><h2>{escape(s.title)}</h2>\n{s.body_html}\n</section>' for place, s in placed
    )
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">'
        f"<style>{style}</style></head>\n"
        f'<body><div class="page"><header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>\n'
        f'<nav aria-label="Contents">{links}</nav>\n<main>\n{body}\n</main></div>\n'
        f"<script>{script}</script></body></html>\n"
    )


@cache
def _asset(name: str) -> str:
    return (files("qflow.report") / "assets" / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"


def paragraph(sentence: str, kind: str = "") -> str:
    """A sentence; `kind` is its class, `quiet` for what is missing."""
    return f'<p class="{kind}">{escape(sentence)}</p>' if kind else f"<p>{escape(sentence)}</p>"


def missing(sentence: str) -> str:
    """The sentence that stands in the place of a part that was not run or recorded."""
    return paragraph(sentence, "quiet")


def cell(value: str | float | None, kind: str = "") -> Cell:
    """A cell of a table: text, or a number, which stands at the right; nothing for None."""
    if value is None:
        return "number", ""
    return (kind or "number", number(value)) if isinstance(value, (int, float)) else (kind, escape(value))


def table(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> str:
    """A table; a column of numbers has its heading at the right too."""
    sides = [("number" if rows and rows[0][i][0] == "number" else "") for i in range(len(header))]
    head = "".join(
        f'<th class="{side}">{escape(name)}</th>' if side else f"<th>{escape(name)}</th>"
        for name, side in zip(header, sides, strict=True)
    )
    body = "".join("<tr>" + "".join(_td(*one) for one in row) + "</tr>\n" for row in rows)
    # it scrolls, so the keyboard must reach it
    return (
        f'<div class="scroll" tabindex="0"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'
    )


def _td(kind: str, text: str) -> str:
    return f'<td class="{kind}">{text}</td>' if kind else f"<td>{text}</td>"


def folded(summary: str, body_html: str) -> str:
    """A part that opens with a click."""
    return f"<details><summary>{escape(summary)}</summary>{body_html}</details>"


def code(line: str) -> str:
    """A line for a shell, with a button that copies it."""
    text = escape(line)
    return f'<span class="copy"><code>{text}</code><button type="button" data-copy="{text}">copy</button></span>'


def link(text: str, address: str) -> str:
    """A link to another page, which opens beside this one; the text alone if there is no address."""
    return f'<a href="{escape(address)}" target="_blank" rel="noopener">{escape(text)}</a>' if address else escape(text)


def picture(caption: str, file: Path) -> str:
    """A PNG file, inside the page."""
    data = base64.b64encode(file.read_bytes()).decode("ascii")
    text = escape(caption)
    return f'<figure><figcaption>{text}</figcaption><img alt="{text}" src="data:image/png;base64,{data}"></figure>'


def chart(spec: Mapping[str, Any]) -> str:
    """A chart that assets/charts.js or network.js draws from `spec`."""
    # < and > are escaped in the JSON, so that no operator's name can end the script.
    data = json.dumps(_finite(spec), separators=(",", ":"), allow_nan=False)
    data = data.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
    return f'<div class="chart"><script type="application/json">{data}</script></div>'


def _finite(value: Any) -> Any:
    """Return `value` with numbers of six digits, and null for those that JSON does not have."""
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def number(value: float) -> str:
    """`value` with five digits."""
    return f"{value:.5g}"
