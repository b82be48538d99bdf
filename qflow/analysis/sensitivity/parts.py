"""Parts of the measured rows of a ranking, for processes that have the same model, rows and bad cases.

Rows are measured pass by pass, and a pass gives the same numbers wherever it runs. So the parts share out passes, and
the table of all parts is, bit for bit, that of one process.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias


@dataclass(frozen=True)
class Part:
    """Every `of`-th pass from the one at `index` on, of all passes that measure the rows at `chosen`."""

    method: str
    """That of the ranking, which decides how the bad cases are cut."""
    chosen: Sequence[int]
    """Positions of the rows that all parts measure together."""
    replays: bool
    """By replay; otherwise by full forward passes."""
    one_at_a_time: str
    """Why several quantizers cannot be replayed at once; "" if they can."""
    index: int = 0
    of: int = 1

    @property
    def passes(self) -> slice:
        """The part as a slice of all passes."""
        return slice(self.index, None, self.of)


class GaveUp(Exception):
    """The rows cannot be measured in the present way, as another process has found out."""

    def __init__(self, reason: str, wide: bool) -> None:
        super().__init__(reason)
        self.reason = reason
        self.wide = wide
        """Whether several quantizers were on at once, so that one at a time may do."""


Elsewhere: TypeAlias = Callable[[Part, Callable[[float], None]], Sequence[Mapping[str, Any]] | None]
"""Shares out the passes of a whole to other processes and returns what each gave (`Measure.part`).

It calls the function with the share that is done. None means that they cannot do it.
"""
