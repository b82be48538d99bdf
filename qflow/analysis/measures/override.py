"""Writes precisions of operators as the command-line override that sets them."""

from __future__ import annotations

import re
from collections.abc import Mapping

WEIGHT_ONLY = "{weight: qint16}"  # sets the weight and leaves the output as it is, even if that is high-precision


def override(modules: Mapping[str, str]) -> str:
    """`qconfig.modules={head.box: qint16}`, escaped for Hydra's grammar; "" if that cannot express one of the names."""
    if not all(map(_writable, modules)):
        return ""
    cells = [f"{name.translate(_ESCAPED)}: {spec}" for name, spec in modules.items()]
    return f"qconfig.modules={{{', '.join(cells)}}}"


def _writable(name: str) -> bool:
    """True if Hydra reads the name as a string: the grammar has its characters, and it is no number, null or bool."""
    if not re.fullmatch(r"[\w.\[\](),:=+*/$ -]+", name, re.ASCII) or name.lower() in ("null", "true", "false"):
        return False
    try:
        float(name)
    except ValueError:
        return True
    return False


def setting(spec: str) -> str | dict[str, str]:
    """An advice's `spec` in the form that a setter takes."""
    return {"weight": "qint16"} if spec == WEIGHT_ONLY else spec


_ESCAPED = str.maketrans({c: f"\\{c}" for c in "[](){},:=\\ "})
