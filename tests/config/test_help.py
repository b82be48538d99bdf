"""`--help`: each key with a line that explains it, in 80 columns, from the text of the schemas."""

import subprocess
import sys
from dataclasses import is_dataclass
from typing import get_type_hints

import pytest
from hydra.errors import HydraException
from omegaconf import OmegaConf
from support.compose import compose

from qflow.config.command_schema import SCHEMAS
from qflow.config.command_table import COMMANDS
from qflow.config.explain import explain
from qflow.config.help import command_help, overview
from qflow.config.keys import first_sentence, groups, keys, shipped

ALL = sorted(SCHEMAS)


def leaves(kind, prefix=""):
    """Dotted names of all keys of a schema, read from the classes themselves."""
    for name, hint in get_type_hints(kind).items():
        if is_dataclass(hint):
            yield from leaves(hint, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


@pytest.mark.parametrize("name", ALL)
def test_every_key_is_explained_in_one_line(name):
    read = {key.path: key for key in keys(name)}
    assert set(read) == set(leaves(SCHEMAS[name]))
    for path, key in read.items():
        text = first_sentence(key.text)
        assert text, path
        assert text[0] not in " ,;" and text.endswith("."), (path, text)
        assert len(text) <= 160, (path, text)


@pytest.mark.parametrize("name", ALL)
def test_help_fits_80_columns_and_lists_every_group_and_option(name):
    text = command_help(name, f"qflow {name}")
    assert all(len(line) <= 80 for line in text.splitlines())
    words = " ".join(text.split())
    for group, (_, options) in groups(name).items():
        assert f"{group}: {', '.join(options)}" in words


@pytest.mark.parametrize("name", ALL)
def test_a_group_is_listed_exactly_if_hydra_takes_it(name):
    """And the note about searched keys stands where they are searched."""
    taken, text = groups(name), command_help(name, f"qflow {name}")
    for group in ("task", "device", "tracking", "objective"):
        option = {"task": "digits", "device": "nash-e", "tracking": "local", "objective": "drop_latency"}[group]
        if group in taken:
            compose(f"{group}={option}", name=name)
        else:
            with pytest.raises(HydraException) as refused:
                compose(f"{group}={option}", name=name)
            assert explain(refused.value, name).startswith(f"A group is one that {name} takes, but got {group}")
    for option in taken.get("experiment", ("", []))[1]:
        compose(f"+experiment={option}", name=name)
    assert ("searches keys" in text) is (name == "tune") and ("Groups:" in text) is bool(taken)


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_the_values_in_the_help_are_those_that_hydra_composes(name):
    composed, values = compose(name=name), shipped(name)
    for key in keys(name):
        if key.path in values and not isinstance(values[key.path], (dict, list)):
            expected = OmegaConf.to_container(composed, resolve=False)
            for part in key.path.split("."):
                expected = expected[part]
            assert values[key.path] == expected, key.path


def test_the_list_of_commands_fits_and_names_each_with_its_purpose():
    text = overview()
    assert all(len(line) <= 80 for line in text.splitlines())
    for name, command in COMMANDS.items():
        assert f"  {name:<10}{command.summary}" in text


def test_no_help_loads_a_library_that_is_slow_to_import():
    """Nor does the module of the command, which is imported before."""
    modules = [*(f"qflow.commands.{name}" for name in COMMANDS), "qflow.workflows.train_float"]
    code = (
        f"import sys, {', '.join(modules)}\nfrom qflow.config.help import command_help, overview\n"
        f"overview(), [command_help(name, 'qflow') for name in {ALL}]\n"
        "print({'torch', 'mlflow', 'optuna', 'hydra', 'pandas', 'numpy', 'scipy', 'sklearn'} & {*sys.modules})"
    )
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert shown.stdout.strip() == "set()"
