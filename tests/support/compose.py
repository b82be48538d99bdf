"""Configurations as a user composes them, without a process of their own."""

import sys

import pytest

from qflow.config.command import run_command
from qflow.config.command_schema import register_schema
from qflow.config.keys import conf_dir
from qflow.config.overrides import rewrite
from qflow.config.settings import required


def compose(*overrides, name="tune"):
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    register_schema(name)
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        return hydra_compose(name, overrides=rewrite(overrides))


def run(capsys, *arguments, command="tune"):
    """Exit code and standard error of a command, stopped before it builds anything."""
    from qflow.commands.tune import find_workflow
    from qflow.study.checks import check_study

    def act(config):
        find_workflow(required(config, "workflow"))
        check_study(config)
        return 0

    return ended(capsys, command, act, *arguments)


def ended(capsys, command, act, *arguments):
    """Exit code and standard error of a command that runs `act` for its configuration."""
    argv = sys.argv
    try:
        with pytest.raises(SystemExit) as stop:
            run_command(command, act, arguments)
    finally:
        sys.argv = argv
    return stop.value.code, capsys.readouterr().err


BASE = "+experiment=int8_int16"
