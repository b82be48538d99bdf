"""The rewriting of the command line, from the short forms that users may write to those of Hydra."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException

from qflow.config.command_schema import conf_dir
from qflow.core.errors import ConfigError

VALUED = ("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp", "--cfg", "-c", "--package", "-p")
NAMED = re.compile(
    r"((?:search\.space\.)?(?:qconfig\.modules|qat\.rates)|search\.when|objective\.optimize)(?:\.(.+)|$)"
)
"""Mappings whose keys the user chooses (modules, searched keys, metrics), and one key, which may contain dots."""
FIXES = re.compile(r"(calibration|qconfig|qat)\.(?!(modules|rates)$)\w+$|(qconfig\.modules|qat\.rates)\.")
"""Keys that are removed from the search space when they get a single value."""


def own_device(arguments: Sequence[str], folders: ExitStack) -> list[str]:
    """Let `device=<path of a .yaml file>` name a file in any folder, by adding a copy to Hydra's search path.

    The other files of its folder are copied too, so that it may start from one of them or from a shipped one.
    """
    out = []
    for argument in arguments:
        key, _, value = argument.partition("=")
        path = Path(value).expanduser()
        if key != "device" or path.suffix not in (".yaml", ".yml"):
            out.append(argument)
            continue
        if not path.is_file():
            raise ConfigError(f"A device is a name or the path of a .yaml file, but got {value}, which is no file.")
        root = Path(folders.enter_context(tempfile.TemporaryDirectory(prefix="qflow-device-")))
        (root / "device").mkdir()
        shipped = {p.stem for p in (conf_dir() / "device").glob("*.yaml")}
        for other in path.parent.glob("*.y*ml"):
            if other.stem not in shipped:  # the shipped file of this name must stay available
                shutil.copyfile(other, root / "device" / f"{other.stem}.yaml")
        name = path.stem if path.stem not in shipped else f"own-{path.stem}"
        shutil.copyfile(path, root / "device" / f"{name}.yaml")
        out += [f"device={name}", f"hydra.searchpath=[file://{root}]"]
    return out


def options_first(arguments: Sequence[str]) -> list[str]:
    """Move options before the overrides, because Hydra accepts them only there."""
    options: list[str] = []
    overrides: list[str] = []
    queue = list(arguments)
    while queue:
        argument = queue.pop(0)
        if argument.startswith("-"):
            options.append(argument)
            if argument in VALUED and queue:
                options.append(queue.pop(0))
        else:
            overrides.append(argument)
    return options + overrides


def rewrite(arguments: Sequence[str]) -> list[str]:
    """Rewrite short forms: `experiment=x` to `+experiment=x`, and `key=choice(a,b)` to a search of the key.

    A key that gets a single value on the command line is fixed: it is removed from the search space.
    """
    out = []
    for argument in arguments:
        if argument.startswith(("experiment=", "debug=")):
            argument = f"+{argument}"
        elif argument == "qat_debug":
            argument = f"stages=[{argument}]"
        elif argument == "fit":
            argument = f"mode={argument}"
        override = _parsed(argument)
        if override is not None and override.key_or_group.lstrip("+") == "device.march":
            raise ConfigError(
                f"A march goes with its rules and costs, but got {argument}. Choose a device file: device=<name>."
            )
        if override is not None and not argument.startswith("~"):
            key, value = override.key_or_group.lstrip("+"), argument.split("=", 1)[1]
            if override.is_sweep_override():
                key = key.removeprefix("search.space.")
                argument = _assigned(f"search.space.{key}", f"'{value}'" if "'" not in value else f'"{value}"')
            else:
                if FIXES.match(key) and f"~search.space.{key}" not in arguments:  # Hydra cannot delete null
                    out.append(_assigned(f"search.space.{key}", "null"))
                if NAMED.match(key):
                    argument = _assigned(key, value)
        out.append(argument)
    return out


def _assigned(key: str, value: str) -> str:
    """Return an override for a key that may be new. A module name stays whole; Hydra would split it at its dots."""
    found = NAMED.match(key)
    if found is None or not found[2]:
        return f"++{key}={value}"
    return f"++{found[1]}={{{found[2]}: {value}}}"


def _parsed(argument: str) -> Override | None:
    if argument.startswith("-") or "=" not in argument:
        return None
    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException:
        return None  # Hydra will report the error
