"""The frame of every `python -m qflow.<command>`: it composes and checks the configuration, runs, and exits."""

from __future__ import annotations

import logging
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from io import TextIOWrapper
from typing import NoReturn

from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from qflow.config.command_schema import GROUPS, SCHEMAS, conf_dir, register_schemas
from qflow.config.overrides import options_first, own_device, require_single, rewrite
from qflow.core.errors import ConfigError, QflowError
from qflow.process.allocator import keep_freed_memory
from qflow.process.waiting import wait_briefly

UNQUOTED = (
    "A range inside braces is text, but got one without quotes. Write key='{a: \"choice(1,2)\"}', or key.a=choice(1,2)."
)
DEFECT = 3  # exit code of an unforeseen error (docs/commands.md lists all codes)


def run_command(name: str, act: Callable[[DictConfig], int], argv: Sequence[str] | None = None) -> NoReturn:
    """Compose conf/<name>.yaml with the command line, call `act` and exit with the code that it returns.

    A QflowError is printed as one line and exits with 2; with QFLOW_DEBUG=1 it keeps its traceback. Hydra's own flags
    (--help, --cfg job, --shell-completion, --config-dir) work.
    """
    _set_up()
    debug = os.environ.get("QFLOW_DEBUG", "") not in ("", "0")
    arguments = list(sys.argv[1:] if argv is None else argv)
    ends: list[int | BaseException] = []

    def job(config: DictConfig) -> None:
        try:
            require_known(config, name)
            ends.append(act(config))
        except (Exception, KeyboardInterrupt) as error:  # raised again below, outside of Hydra
            ends.append(error)

    try:
        if name != "tune":
            require_single(arguments, f"qflow.{name}" if name != "train_float" else f"workflows.{name}")
        with ExitStack() as folders:
            sys.argv = [sys.argv[0], *options_first(rewrite(own_device(arguments, folders)))]
            _compose(name, job)
        if ends and isinstance(ends[0], BaseException):
            raise ends[0]
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None  # the shell's code for SIGPIPE; 1 would mean a missed goal
    except KeyboardInterrupt:
        _fail("Interrupted. Finished trials are kept; the same command continues from there.", 130)
    except QflowError as error:
        if debug:
            raise
        _fail(str(error))
    except (HydraException, OmegaConfBaseException, YAMLError) as error:
        if debug:
            raise
        _fail(explain(error, name))
    except Exception:  # a defect of qflow or of the user's code, which needs a code of its own
        traceback.print_exc()
        raise SystemExit(DEFECT) from None
    raise SystemExit(ends[0] if ends else 0)


def _compose(name: str, job: Callable[[DictConfig], None]) -> None:
    import hydra

    try:
        hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=name)(job)()
    except ValueError as error:  # an option of a group that is no name
        raise ConfigError(f"An override sets a key, or names an option of a group, but got {error}.") from error


def _set_up() -> None:
    """Set up the process: its console, threads and memory, where modules are found, and what Hydra prints."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name must not end a study where the console is ASCII
    wait_briefly()
    keep_freed_memory()
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises errors instead of printing them
    warnings.filterwarnings("ignore", message=".*version_base.*")
    logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)  # it logs errors that it raises too
    sys.path.insert(0, os.getcwd())  # the user's own task is found from the working folder
    register_schemas()


def _fail(message: str, code: int = 2) -> NoReturn:
    print(f"qflow: {' '.join(line.strip() for line in message.splitlines())}", file=sys.stderr)
    raise SystemExit(code)


def require_known(config: DictConfig, name: str) -> None:
    """Raise ConfigError for keys that are not in the schema; `+key=value` would add them without an error."""
    try:
        unresolved = OmegaConf.create(OmegaConf.to_container(config, resolve=False))  # plain containers, without schema
        OmegaConf.merge(OmegaConf.structured(SCHEMAS[name]), unresolved)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error, name)) from error


def experiments() -> list[str]:
    """Return the names of the experiments that run a workflow of qflow.tune."""
    return sorted(p.stem for p in (conf_dir() / "experiment").glob("*.yaml") if "\nworkflow:" in p.read_text())


def explain(error: Exception, config: str = "tune") -> str:
    """Return one line for an error of Hydra or OmegaConf, with the key or value and those that exist."""
    if isinstance(error, YAMLError):
        return f"A configuration file is YAML, but got {' '.join(str(error).split())}. Correct that line."
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
        if not known:
            return f"A key must exist in the configuration, but got {key}. To add it, write +{key}=..."
        return f"A key must exist in the configuration, but got {key}. Keys of {parent or config}: {known}."
    if "No match in the defaults list" in first or ("Could not override" in first and "." not in first.split("'")[1]):
        name = first.split("'")[1]
        return f"A group must exist, but got {name}. Groups: {', '.join(GROUPS)}."
    lost = re.search(r"In '(\S+)': Could not load '(\S+)'", first)
    if lost:
        group = lost.group(2).rpartition("/")[0]
        shipped = ", ".join(sorted(path.stem for path in (conf_dir() / group).glob("*.yaml")))
        return (
            f"A file's defaults name others of its group, but got {lost.group(2)} in {lost.group(1)}. "
            f"Shipped are: {shipped or 'none'}."
        )
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
    if key == "tags" and "Set[str]" in text:  # Hydra's own object for choice(...) or interval(...)
        return UNQUOTED
    if wrong := _grammar(text):
        return wrong
    if key and key not in text:
        return f"{text.rstrip('.')}, for {key}."
    return text if len(text) > 8 else first


def _grammar(text: str) -> str:
    """Return one line for an error of Hydra's parser; "" for another error."""
    if re.search("no viable alternative|mismatched input|extraneous input|LexerNoViableAlt|token recognition", text):
        got = text.split(" at input ")[-1].removeprefix("LexerNoViableAltException: ").rstrip("^ ")
        return f"An override is key=value with closed brackets and quotes, but got {got or 'an empty one'}."
    if "missing EQUAL" in text:
        got = text.partition("override ")[2].partition(" missing EQUAL")[0]
        return f"An override is key=value, but got {got} without =. Quote a value with blanks: 'key=\"a b\"'."
    return ""
