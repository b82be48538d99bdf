"""python -m qflow.describe [<command> [<group or key>]] [--result]: what a program can set, and what it gets.

Prints JSON: without a command the table of all commands, with their exit codes; with one the JSON Schema of its
settings, or with `--result` of the document that it writes with `--json`. A group or key gives that part alone. Exit
code 0: printed; 2: a command, group or key that does not exist.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from qflow.config.command import Result, run_command
from qflow.config.command_table import COMMANDS
from qflow.core.errors import ConfigError
from qflow.core.nearest import did_you_mean

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main() -> None:
    """Entry point."""
    run_command("describe", describe)


def describe(config: DictConfig) -> Result:
    """Print what `config.about` names, and return it."""
    from qflow.config import json_schema
    from qflow.config.command_schema import SCHEMAS
    from qflow.study.fingerprint import FREE

    command, *paths = config.about or [""]
    if len(paths) > 1:
        raise ConfigError(
            f"One group or key of a command is described at a time, but got {', '.join(paths)}. Name one: qflow "
            f"describe {command} {paths[0]}."
        )
    if command and command not in SCHEMAS:
        known = ", ".join(COMMANDS)
        raise ConfigError(f"A command is one of {known}, but got {command}.{did_you_mean(command, COMMANDS)}")
    if config.result and not command:
        raise ConfigError("--result is of a command, but got none. Name one: qflow describe tune --result.")
    if not command:
        found = json_schema.table()
    elif config.result:
        found = json_schema.document_schema(command)
    else:
        found = json_schema.settings(command, FREE if command == "tune" else ())
    if paths:
        found = json_schema.part(found, paths[0])
    print(json.dumps(found, indent=1))
    return 0, {"described": found}
