"""Writing a fitted cost model to a device file, either to a new one or in place of the cost section."""

from __future__ import annotations

import textwrap
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import OmegaConf

from qflow.config.device_file import device_names, load_rules
from qflow.core.device_rules import DeviceRules
from qflow.core.errors import ConfigError
from qflow.core.record import plain

if TYPE_CHECKING:
    from qflow.cost_model.model import CostModel


def write_cost(model: CostModel, path: Path, rules: DeviceRules) -> None:
    """Write `model` to the device file `path`, in place of its cost section, which must be the last section.

    If there is no file, a new one is written for a device with `rules`. Raises ConfigError, also for a file of another
    march.
    """
    if path.suffix not in (".yaml", ".yml"):
        raise ConfigError(f"A fitted device file is a .yaml file, but got {path}. Name it so.")
    try:
        head = _head(path, rules.march) if path.exists() else _new_head(rules)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(head + cost_section(model))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"A fitted device file is written to out, but got {error}. Name another file.") from error


def _head(path: Path, march: str) -> str:
    """Return the text of a device file before its cost section."""
    head, found, rest = path.read_text().partition("\ncost:\n")
    if not found or any(line and not line.startswith((" ", "#")) for line in rest.splitlines()):
        raise ConfigError(f"A device file ends with its cost section, but got another order in {path}. Move it.")
    if (other := load_rules(path).march) != march:
        raise ConfigError(
            f"A fit for {march} is written to a file of {march}, but got {other} in {path}. Name another."
        )
    return f"{head}\n"


def _new_head(rules: DeviceRules) -> str:
    """Return the head of a new file: a shipped device with these rules as default, else the rules themselves."""
    for name in [rules.march, *device_names()]:
        if load_rules(name) == rules:
            return f"defaults: [{name}, _self_]\n"
    own = plain(rules)
    return OmegaConf.to_yaml({"march": own.pop("march"), "oe_version": own.pop("oe_version"), "rules": own})


def cost_section(model: CostModel) -> str:
    """Return `cost:` as YAML with one parameter per line, and factors as [lowest, likely, highest]."""
    lines = ["cost:"]
    for f in fields(model):
        value: Any = getattr(model, f.name)
        if f.name == "march":
            continue
        if f.name == "provenance":
            folded = textwrap.wrap(value, 110, break_long_words=False, break_on_hyphens=False)
            lines += ["  provenance: >-", *(f"    {line}" for line in folded)] if value else []
        elif isinstance(value, tuple):
            lines.append(f"  {f.name}: [{', '.join(f'{v:g}' for v in value)}]")
        elif isinstance(value, dict):
            entries = ", ".join(f"{key}: [{', '.join(f'{v:g}' for v in r)}]" for key, r in value.items())
            lines.append(f"  {f.name}: {{{entries}}}")
        else:
            lines.append(f"  {f.name}: {'null' if value is None else _scalar(value)}")
    text = "\n".join(lines) + "\n"
    OmegaConf.create(text)  # raises if the text cannot be read
    return text


def _scalar(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:.6g}" if isinstance(value, float) else str(value)
