"""How a record shows itself: in one line on a console, as a table in a notebook."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

SHOWN = 60  # rows of a table in a notebook; the record has all


@dataclass(frozen=True)
class View:
    """A record in one line (`title`), and as a table; numbers are shown with four digits."""

    title: str
    header: Sequence[str]
    rows: Sequence[Sequence[object]]

    def text(self, most: int) -> str:
        """Return the title and the first `most` rows, in columns."""
        cells = [list(self.header), *([_text(value) for value in row] for row in self.rows[:most])]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = ["  ".join(text.ljust(w) for text, w in zip(line, widths, strict=True)).rstrip() for line in cells]
        left = len(self.rows) - most
        return "\n".join([self.title, "", *lines, *([f"{left} more rows"] if left > 0 else [])])

    def html(self) -> str:
        """Return title and table as HTML. Everything in it is escaped."""
        head = "".join(f"<th>{escape(name)}</th>" for name in self.header)
        body = "".join(
            "<tr>" + "".join(f"<td>{escape(_text(value))}</td>" for value in row) + "</tr>" for row in self.rows[:SHOWN]
        )
        left = len(self.rows) - SHOWN
        more = f"<p>{left} more rows</p>" if left > 0 else ""
        return f"<p>{escape(self.title)}</p><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>{more}"


class Shown:
    """A base of records: `view` gives what `repr` and a notebook show. Use `@dataclass(repr=False)` on it."""

    def view(self) -> View:
        """Return the record as a title and a table."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.view().title}>"

    def _repr_html_(self) -> str:
        return self.view().html()


def _text(value: object) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
