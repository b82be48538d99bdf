"""One check of the plugin against its contract."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Checked:
    """What was checked, what the contract says, and what the installed plugin has."""

    what: str
    expected: str
    got: str
    ok: bool
