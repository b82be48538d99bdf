"""The known name that a mistyped one is nearest to, for the last sentence of an error."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(got: object, known: Iterable[object]) -> str:
    """Return the name of `known` that looks most like `got`, in any case; "" if none does."""
    names = {str(name).lower(): str(name) for name in known}
    found = difflib.get_close_matches(str(got).lower(), names, n=1, cutoff=0.6)
    return names[found[0]] if found else ""


def did_you_mean(got: object, known: Iterable[object]) -> str:
    """Return ` Did you mean <name>?` with the nearest name; "" if none is near."""
    name = nearest(got, known)
    return f" Did you mean {name}?" if name and name != str(got) else ""
