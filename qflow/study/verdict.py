"""The verdict on a trial that is to be promoted, with its reasons."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Verdict:
    """The reasons against a version by kind, and what is said beside them."""

    anomalous: list[str] = field(default_factory=list)
    infeasible: list[str] = field(default_factory=list)
    rejected: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def word(self) -> str:
        """The verdict: that of the gravest reason."""
        kinds = {"ANOMALOUS": self.anomalous, "INFEASIBLE": self.infeasible, "REJECT": self.rejected}
        return next((word for word, reasons in kinds.items() if reasons), "ACCEPT")

    def record(self, **more: Any) -> dict[str, Any]:
        """Return the result for scripts: the verdict, its reasons and notes, and `more`."""
        reasons = [*self.anomalous, *self.infeasible, *self.rejected]
        return {"verdict": self.word, "reasons": reasons, "notes": self.notes, **more}

    def show(self) -> None:
        """Print notes, reasons and the word."""
        for text in self.notes:
            print(f"{'note':<12}{text}")
        for text in (*self.anomalous, *self.infeasible, *self.rejected):
            print(f"{'refused':<12}{text}")
        print(f"{'verdict':<12}{self.word}")
