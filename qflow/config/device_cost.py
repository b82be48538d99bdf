"""The cost section of a device file from a fitted model: written anew, or renewed in a file that is there."""

from __future__ import annotations

import textwrap
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from qflow.core.errors import ConfigError

if TYPE_CHECKING:
    from qflow.cost.model import CostModel


def write_cost(model: CostModel, path: Path, base: str) -> None:
    """Write `model` to the device file `path`: in place of its cost section, which must be its last, or as a new
    file that starts from the shipped device `base`. Raises ConfigError.
    """
    section = cost_section(model)
    if path.exists():
        head, found, rest = path.read_text().partition("\ncost:\n")
        if not found or any(line and not line.startswith((" ", "#")) for line in rest.splitlines()):
            raise ConfigError(f"A device file ends with its cost section, but got another order in {path}. Move it.")
        text = f"{head}\n{section}"
    else:
        text = f"defaults: [{base}, _self_]\n{section}"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise ConfigError(f"A fitted device file is written to out, but got {error}. Name another file.") from error


def cost_section(model: CostModel) -> str:
    """`cost:` as YAML, one parameter a line, factors as [lowest, likely, highest]."""
    lines = ["cost:"]
    for f in fields(model):
        value: Any = getattr(model, f.name)
        if f.name == "march":
            continue
        if f.name == "provenance":
            folded = textwrap.wrap(value, 110, break_long_words=False, break_on_hyphens=False)
            lines += ["  provenance: >-", *(f"    {line}" for line in folded)] if value else []
        elif isinstance(value, dict):
            entries = ", ".join(f"{key}: [{', '.join(f'{v:g}' for v in r)}]" for key, r in value.items())
            lines.append(f"  {f.name}: {{{entries}}}")
        else:
            lines.append(f"  {f.name}: {'null' if value is None else _scalar(value)}")
    text = "\n".join(lines) + "\n"
    OmegaConf.create(text)  # what is written can be read
    return text


def _scalar(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:.6g}" if isinstance(value, float) else str(value)
