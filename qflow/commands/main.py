"""qflow <command>: the one command line; each command is `python -m qflow.<command>` too."""

from __future__ import annotations

import importlib
import sys
from typing import NoReturn

from qflow.config.command_table import COMMANDS, MISTAKE
from qflow.config.json_output import Problem, document
from qflow.core.errors import ConfigError
from qflow.core.nearest import did_you_mean
from qflow.core.version import VERSION
from qflow.process.interrupts import end_at_once


def main() -> NoReturn:
    """Entry point."""
    first, *rest = sys.argv[1:] or ["--help"]
    if first in COMMANDS:
        end_at_once()
        sys.argv = ["qflow", *rest]
        importlib.import_module(f"qflow.commands.{first}").main()
    json = "--json" in rest
    try:
        text, problem, code = answer(first, [word for word in rest if word != "--json"]), None, 0
    except ConfigError as refused:
        text, problem, code = "", Problem("ConfigError", str(refused)), 2
        print(f"qflow: {refused}", file=sys.stderr)
    if json:
        print(document(first, code, MISTAKE if problem else "done", {"text": text} if text else {}, problem), end="")
    elif text:
        print(text)
    raise SystemExit(code)


def answer(first: str, rest: list[str]) -> str:
    """Return what is printed where no command runs. Raises ConfigError for a command that does not exist."""
    if first in ("--help", "-h", "help"):
        from qflow.config.help import overview

        return overview()
    if first == "--version":
        return f"qflow {VERSION}"
    if first in ("--completion", "--complete"):
        from qflow.config.completion import complete, script

        given = " ".join(rest)
        return script(given).rstrip() if first == "--completion" else "\n".join(complete(given))
    known = ", ".join(COMMANDS)
    raise ConfigError(f"A command is one of {known}, but got {first}.{did_you_mean(first, COMMANDS)}")
