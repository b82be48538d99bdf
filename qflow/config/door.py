"""The way in for every `python -m qflow.<door>`: compose, check, act, and end with one line and a code."""

from __future__ import annotations

import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import NoReturn

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qflow.config.schema import GROUPS, SCHEMAS, conf_dir, register_schemas
from qflow.core.errors import ConfigError, QflowError

DEFECT = 3  # exit code of an unforeseen error; 0, 1 and 2 have their meanings
VALUED = ("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp", "--cfg", "-c", "--package", "-p")


def run_door(name: str, act: Callable[[DictConfig], int], argv: Sequence[str] | None = None) -> NoReturn:
    """Compose conf/<name>.yaml with the command line and call `act`; exit with its code, or 2 in one line.

    Hydra's own flags (--help, --cfg job, --shell-completion, --config-dir) work. With QFLOW_DEBUG=1 errors keep
    their traceback.
    """
    import hydra

    debug = os.environ.get("QFLOW_DEBUG", "") not in ("", "0")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # errors come to us instead of to Hydra's own printer
    warnings.filterwarnings("ignore", message=".*version_base.*")
    sys.path.insert(0, os.getcwd())  # the user's own task lies in the folder the user is in
    register_schemas()
    arguments = list(sys.argv[1:] if argv is None else argv)
    ends: list[int | BaseException] = []

    def job(config: DictConfig) -> None:
        try:
            require_known(config, name)
            ends.append(act(config))
        except (Exception, KeyboardInterrupt) as error:  # raised again below, past Hydra's own printing
            ends.append(error)

    try:
        sys.argv = [sys.argv[0], *options_first(rewrite(arguments))]
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=name)(job)()
        if ends and isinstance(ends[0], BaseException):
            raise ends[0]
    except KeyboardInterrupt:
        _fail("Interrupted. What is finished is kept; the same command goes on from there.", 130)
    except QflowError as error:
        if debug:
            raise
        _fail(str(error))
    except (HydraException, OmegaConfBaseException) as error:
        if debug:
            raise
        _fail(explain(error, name))
    except Exception:  # a defect of ours, or of code that a task brings: not to be taken for a missed goal
        traceback.print_exc()
        raise SystemExit(DEFECT) from None
    raise SystemExit(ends[0] if ends else 0)


def _fail(message: str, code: int = 2) -> NoReturn:
    print(f"qflow: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(code)


def require_known(config: DictConfig, name: str) -> None:
    """Refuse keys that no schema has: `+key=value` would add them unseen. Raises ConfigError."""
    try:
        unresolved = OmegaConf.create(OmegaConf.to_container(config, resolve=False))  # as text: schemas forgotten
        OmegaConf.merge(OmegaConf.structured(SCHEMAS[name]), unresolved)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error, name)) from error


def options_first(arguments: Sequence[str]) -> list[str]:
    """Hydra takes its options before the overrides only; users write them where they think of them."""
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
    """Let users write what they mean: `experiment=x` for `+experiment=x`, `key=choice(a,b)` to search a key.

    A key that gets one value on the command line is fixed: it leaves the search space.
    """
    out = []
    for argument in arguments:
        if argument.startswith(("experiment=", "debug=")):
            argument = f"+{argument}"
        elif argument == "qat_debug":
            argument = f"stages=[{argument}]"
        override = _parsed(argument)
        if override is not None and override.is_sweep_override():
            key, value = override.key_or_group.lstrip("+"), argument.split("=", 1)[1]
            argument = f"++search.space.{key}='{value}'" if "'" not in value else f'++search.space.{key}="{value}"'
        elif override is not None and re.fullmatch(r"(calibration|qconfig)\.\w+", override.key_or_group):
            key = f"search.space.{override.key_or_group}"
            if f"~{key}" not in arguments:  # Hydra cannot delete what is null already
                out.append(f"++{key}=null")
        out.append(argument)
    return out


def _parsed(argument: str) -> Override | None:
    if argument.startswith("-") or "=" not in argument:
        return None
    try:
        return OverridesParser.create().parse_override(argument)
    except HydraException:
        return None  # Hydra will say what is wrong with it


def experiments() -> list[str]:
    """Names of the experiments that run a workflow of qflow.tune."""
    return sorted(p.stem for p in (conf_dir() / "experiment").glob("*.yaml") if "\nworkflow:" in p.read_text())


def explain(error: Exception, config: str = "tune") -> str:
    """One line for what Hydra or OmegaConf found wrong: the key or value, and those that exist."""
    cause: BaseException = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    text = " ".join(str(cause).split())
    key = str(getattr(cause, "full_key", "") or "")
    found = re.search(r"full_key: (\S+)", text)
    key = key or (found.group(1) if found else "")
    text = text.split(" full_key:")[0].split(" See https://")[0]
    first = " ".join(str(error).split())
    if "not in" in text and key:
        schema = OmegaConf.structured(SCHEMAS[config])
        parent = key.rpartition(".")[0]
        node = OmegaConf.select(schema, parent) if parent else schema
        known = ", ".join(str(k) for k in node) if node is not None else ""
        return f"A key must exist in the configuration, but got {key}. Keys of {parent or config}: {known}."
    if "No match in the defaults list" in first or ("Could not override" in first and "." not in first.split("'")[1]):
        name = first.split("'")[1]
        return f"A group must exist, but got {name}. Groups: {', '.join(GROUPS)}."
    if "Could not find" in first or ("In '" in first and "Could not" in first):
        wanted = first.split("Could not find '")[-1].split("'")[0]
        options = first.partition("Available options in")[2].partition(":")[2].split("Config search path")[0].split()
        shown = ", ".join(o.strip("',") for o in options)
        return f"A group option must exist, but got {wanted}. Options: {shown}."
    if "Missing mandatory value" in text and key == "workflow":
        names = experiments()
        return f"A study needs an experiment, but got none. Add +experiment=<name>: {', '.join(names)}."
    if "Missing mandatory value" in text:
        return f"A value is needed for {key}, but got none. Set {key}=..., or add +experiment=<name>."
    if "no viable alternative" in text or "mismatched input" in text or "extraneous input" in text:
        return f"An override is key=value with closed brackets and quotes, but got {text.split(' at input ')[-1]}."
    if key and key not in text:
        return f"{text.rstrip('.')}, for {key}."
    return text if len(text) > 8 else first
