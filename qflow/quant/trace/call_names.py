"""Names of operator calls while tracing: calls are counted, and functionals also have their call site (sites.py)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

from qflow.quant.trace.sites import call_site, user_line


class CallNames:
    """The calls of a trace so far."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.names: set[str] = set()
        self.indices: Counter[tuple[str, str, int]] = Counter()
        self.sites: dict[tuple[str, str, int, int], str] = {}
        self.given: Mapping[tuple[str, str, int, int], str] | None = None
        """Names by call site from an earlier trace (`Plan.sites`); a call at another site is named after its line."""

    def called(self, base: str) -> str:
        """Name of this call of the functional `base`; it is stored with the call site."""
        key = (base, *call_site())
        index = self.indices[key]
        self.indices[key] += 1
        if self.given is None:
            name = self.unique(base)
        else:
            name = self.given.get((*key, index)) or self.unique(f"{base}{user_line()}")
            self.names.add(name)
        self.sites[(*key, index)] = name
        return name

    def unique(self, base: str) -> str:
        """`base`, or `base(n)` for its n-th repetition."""
        n = self.counts[base]
        self.counts[base] += 1
        name = base if n == 0 else f"{base}({n})"
        self.names.add(name)
        return name
