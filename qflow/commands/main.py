"""qflow <command>: the one command line; each command is `python -m qflow.<command>` too."""

from __future__ import annotations

import importlib
import sys
from typing import NoReturn

from qflow.config.command_table import COMMANDS
from qflow.core.errors import ConfigError
from qflow.core.nearest import did_you_mean
from qflow.core.version import VERSION


def main() -> None:
    """Entry point."""
    first, *rest = sys.argv[1:] or ["--help"]
    if first in COMMANDS:
        sys.argv = ["qflow", *rest]
        importlib.import_module(f"qflow.commands.{first}").main()
    try:
        print(answer(first, rest))
    except ConfigError as error:
        _fail(str(error))


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


def _fail(message: str) -> NoReturn:
    print(f"qflow: {message}", file=sys.stderr)
    raise SystemExit(2)
