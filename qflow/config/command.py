"""The frame of every command, `qflow <command>` or `python -m qflow.<command>`.

It composes and checks the configuration, runs the command, and exits with its code. What needs no configuration
(`--help`) is answered before Hydra is imported; a line says on the terminal what is done before anything heavy is.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from io import TextIOWrapper
from typing import TYPE_CHECKING, Any, NoReturn

from qflow.config.command_table import CLOSED_PIPE, DEFECT, INTERRUPTED, named
from qflow.config.foreign import foreign_line
from qflow.config.json_output import Problem, document, only_json, so_far
from qflow.core.credentials import masked
from qflow.core.errors import QflowError
from qflow.core.stored_text import one_line, printable
from qflow.process.interrupts import interrupts

if TYPE_CHECKING:
    from omegaconf import DictConfig

Result = int | tuple[int, Mapping[str, Any]]
"""What a command returns: its exit code, and the fields of its result for `--json`."""
REFUSED = "The options of a command are those of --help, but got others. The lines above say which."


def run_command(name: str, act: Callable[[DictConfig], Result], argv: Sequence[str] | None = None) -> NoReturn:
    """Compose conf/<name>.yaml with the command line, call `act` and exit with the code that it returns.

    A QflowError is printed as one line and exits with 2, and so is an exception of the system or of a store
    (config/foreign.py); with QFLOW_DEBUG=1 its traceback stands before the line. With
    `--json` stdout is one JSON document however the command ends, and what is printed goes to stderr. Hydra's own flags
    (--cfg job, --hydra-help, --shell-completion, --config-dir) work.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    json = "--json" in arguments
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a name must not end a study where the console is ASCII
    message = ""
    with only_json(json) as write:
        try:
            with interrupts():  # SIGTERM is an end like Ctrl-C: open runs are closed, and the exit code says it
                code, record, problem = _answer(name, act, arguments)
            if problem and code != DEFECT:
                print(f"qflow: {problem.line}", file=sys.stderr)
            if json:
                write(document(name, code, named(name).meaning(code), record, problem))
            sys.stdout.flush()
        except OSError as error:  # the reader of our output has closed the pipe, or its disk is full
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            code = CLOSED_PIPE if isinstance(error, BrokenPipeError) else 2
            if code == 2 and not message:
                print(f"qflow: {foreign_line(error) or error}", file=sys.stderr)
    if code == INTERRUPTED:
        exec("")  # CPython forgets a Ctrl-C inside an `exec`, such as dataclass's, by which it would end the process
    raise SystemExit(code)


def _answer(
    name: str, act: Callable[[DictConfig], Result], arguments: Sequence[str]
) -> tuple[int, Mapping[str, Any], Problem | None]:
    """Return the exit code, the result's fields, and what ended the command where it did not do its work."""
    try:
        if not {"--help", "-h"}.isdisjoint(arguments):
            from qflow.config.help import command_help

            text = command_help(name, called(name))
            print(text)
            return 0, {"text": text}, None
        words = [word for word in arguments if word != "--json"]
        shown = sys.stdout.isatty() and not any(word.startswith("-") for word in arguments)
        if shown:
            print(f"{name:<12} {named(name).summary or 'train the float weights of a task'}", flush=True)
        from qflow.config.compose import composed
        from qflow.config.overrides import flags_and_sources, require_values

        require_values(words, json="--json" in arguments)
        acting = _saying_the_task(act) if shown else act
        ended = composed(name, module_name(name), acting, flags_and_sources(name, words)) or 0
    except BrokenPipeError:
        raise
    except (KeyboardInterrupt, SystemExit, Exception) as error:
        code, line = _end(error)
        return code, so_far(error), Problem(_kind(error), line) if line else None
    return (ended, {}, None) if isinstance(ended, int) else (*ended, None)


def _end(error: BaseException) -> tuple[int, str]:
    """Return the exit code and the line of an exception; the traceback is printed of a defect, or in debug mode."""
    debug = os.environ.get("QFLOW_DEBUG", "") not in ("", "0")
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, "Interrupted. Finished trials are kept; the same command continues from there."
    if isinstance(error, SystemExit):  # of Hydra's options, which has printed why
        return _code_of(error), "" if not error.code else REFUSED
    line = str(error) if isinstance(error, QflowError) else foreign_line(error)
    if debug or not line:
        sys.stderr.write(printable(masked("".join(traceback.format_exception(error)))))
    if not line:  # a defect needs a code of its own
        return DEFECT, one_line(masked(f"{type(error).__name__}: {error}"))
    return 2, one_line(masked(line))


def _kind(error: BaseException) -> str:
    """Return the name of an exception, as programs tell errors apart."""
    if isinstance(error, SystemExit):
        return "ConfigError"
    return "Interrupted" if isinstance(error, KeyboardInterrupt) else type(error).__name__


def _saying_the_task(act: Callable[[DictConfig], Result]) -> Callable[[DictConfig], Result]:
    """Return `act` with a line before it: the task and the march that the configuration names, if it runs one."""

    def acting(config: DictConfig) -> Result:
        from omegaconf import OmegaConf

        task, march = (OmegaConf.select(config, key) for key in ("task.name", "device.march"))
        if task and march and not config.get("from_run") and config.get("mode") != "fit":
            print(f"{'task':<12} {task} on {march}", flush=True)
        return act(config)

    return acting


def _code_of(ended: SystemExit) -> int:
    """Return the exit code; a text in its place stands for a mistake."""
    if ended.code is None or isinstance(ended.code, int):
        return ended.code or 0
    print(ended.code, file=sys.stderr)
    return 2


def called(name: str) -> str:
    """Return how the command was called, for its help: `qflow tune` or `python -m qflow.tune`."""
    if os.path.basename(sys.argv[0]) == "qflow":
        return f"qflow {name}"
    return f"python -m {module_name(name)}"


def module_name(name: str) -> str:
    """Return the module that `python -m` runs for a command."""
    return f"qflow.{name}" if name != "train_float" else f"workflows.{name}"
