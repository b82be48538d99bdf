"""The rewriting of the command line, from the short forms that users may write to those of Hydra."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override, QuotedString
from hydra.errors import HydraException

from qflow.config.command_table import named
from qflow.config.keys import conf_dir, switches
from qflow.config.own_conf import own_conf
from qflow.config.quoting import assignment, in_braces, mended, quoted
from qflow.config.yaml_file import mapping_text
from qflow.core.errors import ConfigError
from qflow.core.nearest import did_you_mean
from qflow.core.temporary import TemporaryFolder

VALUED = ("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp", "--cfg", "-c", "--package", "-p")
OPTIONS = (
    *("--help", "--hydra-help", "--cfg", "--resolve", "--version", "--info", "--multirun", "--run", "--package"),
    *("--config-dir", "--config-name", "--config-path", "--shell-completion", "--experimental-rerun"),
)
"""Hydra's own, each of which may be shortened as far as it stays the only one."""
SHORT = ("-h", "-c", "-r", "-p", "-m", "-sc", "-cp", "-cn", "-cd", "-i")
"""Hydra's short forms."""
SHOWN = ("job", "hydra", "all")
"""What `--cfg` can print."""
NAMED = re.compile(
    r"((?:search\.space\.)?(?:qconfig\.modules|qat\.rates)|search\.when|objective\.optimize)(?:\.(.+)|$)"
)
"""Mappings whose keys the user chooses (modules, searched keys, metrics), and one key, which may contain dots."""
FIXES = re.compile(r"(calibration|qconfig|qat|repair)\.(?!(modules|rates)$)\w+$|(qconfig\.modules|qat\.rates)\.")
"""Keys that are removed from the search space when they get a single value."""


def own_files(arguments: Sequence[str], folders: ExitStack) -> list[str]:
    """Let overrides name the user's own files, by adding places to Hydra's search path.

    `task=mine` may be conf/task/mine.yaml of the working folder (own_conf.py). `device=<path of a .yaml file>` is a
    file in any folder: a link to it is made, and to the other files of its folder, so that it may start from one of
    them or from a shipped one. Raises ConfigError for what is no device file, and for a file that has the name of a
    shipped one.
    """
    out, places = [], own_conf(arguments)
    for argument in arguments:
        key, _, value = argument.partition("=")
        path = Path(os.path.expanduser(value))
        if key != "device" or path.suffix not in (".yaml", ".yml"):
            out.append(argument)
            continue
        mapping_text(path, "A device is a name or a .yaml file")
        root = Path(folders.enter_context(TemporaryFolder()))
        (root / "device").mkdir()
        shipped = {p.stem for p in (conf_dir() / "device").glob("*.yaml")}
        for other in path.parent.glob("*.y*ml"):
            if other.stem not in shipped:  # the shipped file of this name must stay available
                _link(other, root / "device" / f"{other.stem}.yaml")
        name = f"own-{path.stem}" if re.fullmatch(r"[\w-]+", path.stem, re.ASCII) else "own-device"
        while (root / "device" / f"{name}.yaml").exists():
            name = f"own-{name}"
        _link(path, root / "device" / f"{name}.yaml")
        out.append(f"device={name}")
        places.append(root)
    searched = ",".join(quoted(f"file://{place}") for place in places)
    return [f"hydra.searchpath=[{searched}]", *out] if places else out


def _link(path: Path, link: Path) -> None:
    link.unlink(missing_ok=True)
    link.symlink_to(path.absolute())


def flags_and_sources(command: str, arguments: Sequence[str]) -> list[str]:
    """Rewrite what belongs to one command: `--check` to `check=true`, words to `sources=[...]` or `kind=`."""
    known_switches, takes = switches(command), named(command).words
    out: list[str] = []
    words: list[str] = []
    for argument in arguments:
        if argument in known_switches:
            out.append(f"{known_switches[argument]}=true")
        elif re.match("-[a-zA-Z]", argument) and argument not in SHORT:
            raise ConfigError(
                f"A short option is one of {', '.join(SHORT)}, but got {argument}. --help names the others."
            )
        elif argument.startswith("--") and not _is_option(argument):
            options = [*known_switches, "--json", *OPTIONS]
            raise ConfigError(
                f"An option is one of {', '.join(options)}, but got {argument}.{did_you_mean(argument, options)}"
            )
        elif command == "init" and argument in named(command).values["kind"]:
            out.append(f"kind={argument}")
        elif takes:
            (out if "=" in argument or argument.startswith("-") else words).append(argument)
        else:
            out.append(argument)
    return [f"{takes}=[{','.join(map(quoted, words))}]", *out] if words else out


def _is_option(argument: str) -> bool:
    """Return whether an argument is a long option of Hydra, as argparse reads it, or the end of all options."""
    name = argument.partition("=")[0]
    return name in ("--", *OPTIONS) or sum(option.startswith(name) for option in OPTIONS) == 1


def require_values(arguments: Sequence[str], json: bool) -> None:
    """Raise ConfigError for an option without its value, and for a configuration that is printed as `json`."""
    for argument, following in pairwise([*arguments, ""]):
        name, is_set, value = argument.partition("=")
        if name not in VALUED:
            continue
        value = value if is_set else following
        shows = name in ("--cfg", "-c")
        if not value or value.startswith("-") or (shows and value not in SHOWN):
            kind = f"one of {', '.join(SHOWN)}" if shows else "a value"
            raise ConfigError(f"{name} is followed by {kind}, but got {value!r}.")
        if shows and json:
            raise ConfigError(f"{name} prints YAML, but got --json with it. Leave --json out.")


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


def require_single(arguments: Sequence[str], name: str) -> None:
    """Raise ConfigError for several values of a key, and for -m, at a command that runs one configuration."""
    for argument in arguments:
        override = _parsed(argument)
        if argument == "-m" or (len(argument) > 3 and "--multirun".startswith(argument)):
            raise ConfigError(f"{name} runs one configuration, but got {argument}. Leave it out.")
        if override is None or not override.is_sweep_override():
            continue
        (key, _, text), value = argument.partition("="), override.value()
        if key.lstrip("+").startswith("search."):
            continue  # a study would search it, and this command searches nothing
        listed = isinstance(value, ChoiceSweep) and value.simple_form
        raise ConfigError(
            f"{name} takes one value for a key, but got {argument}. Write {_first(key, value)}"
            f"{f', or {assignment(key, text)} for a text with commas' if listed else ''}; qflow.tune searches several."
        )


def _first(key: str, sweep: object) -> str:
    """Return `key=value`, as it is pasted into a shell, with the first value of a sweep."""
    first = sweep.list[0] if isinstance(sweep, ChoiceSweep) else getattr(sweep, "start", None)
    if isinstance(first, (str, QuotedString)):
        return assignment(key, getattr(first, "text", first))
    return f"{key}={first}" if isinstance(first, (int, float)) else f"{key}=<value>"


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


def _braced(argument: str) -> str:
    """Return `group.name=value` as `group={name: value}`, in which a name may have any character; else ""."""
    key, _, value = argument.lstrip("+").partition("=")
    found = NAMED.match(key)
    if found is None or not found[2]:
        return ""
    return in_braces(found[1], found[2], value)


def _parsed(argument: str) -> Override | None:
    if argument.startswith("-") or "=" not in argument:
        return None
    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException as error:
        if line := mended(argument):
            raise ConfigError(
                "A value with other characters than letters, digits and /-\\+.$%*@?| is in quotes, but got "
                f"{' '.join(argument.split())}. Paste: {line}"
            ) from error
        if line := _braced(argument):
            raise ConfigError(
                f"A module's name with other characters than words and dots is in braces, but got {argument}. "
                f"Paste: {line}"
            ) from error
        return None  # Hydra will report the error
