"""An advice as the line of configuration that applies it."""

from __future__ import annotations

import re
from collections.abc import Mapping

WEIGHT_ONLY = "{weight: qint16}"  # the output stays as it is, high precision included


def override(modules: Mapping[str, str]) -> str:
    """`qconfig.modules={head.box: qint16}` with what Hydra's grammar wants escaped; "" where it takes no such key."""
    if not all(map(_writable, modules)):
        return ""
    cells = [f"{name.translate(_ESCAPED)}: {spec}" for name, spec in modules.items()]
    return f"qconfig.modules={{{', '.join(cells)}}}"


def _writable(name: str) -> bool:
    """True where Hydra reads the name as a text: its letters are in the grammar, and it is no number, null or bool."""
    if not re.fullmatch(r"[\w.\[\](),:=+*/$ -]+", name, re.ASCII) or name.lower() in ("null", "true", "false"):
        return False
    try:
        float(name)
    except ValueError:
        return True
    return False


def setting(spec: str) -> str | dict[str, str]:
    """An advice's `spec` as a setter takes it."""
    return {"weight": "qint16"} if spec == WEIGHT_ONLY else spec


_ESCAPED = str.maketrans({c: f"\\{c}" for c in "[](){},:=\\ "})
