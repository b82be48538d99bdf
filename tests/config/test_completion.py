"""Candidates of the shell's completion, and the scripts in a real bash."""

import os
import subprocess
import sys

import pytest

from qflow.config.command_table import COMMANDS
from qflow.config.completion import SCRIPTS, complete
from qflow.config.keys import keys
from qflow.export.targets import TARGETS


@pytest.mark.parametrize("lead", ["qflow ", "python -m qflow ", ".venv/bin/python -m qflow "])
def test_commands_are_completed_after_the_name_of_the_program(lead):
    assert complete(lead) == list(COMMANDS)
    assert complete(f"{lead}tu") == ["tune"]


@pytest.mark.parametrize("lead", ["qflow tune ", "python -m qflow.tune ", "python3 -m qflow tune "])
def test_keys_are_completed_level_by_level_and_options_after_their_group(lead):
    assert complete(f"{lead}search.n_t") == ["search.n_trials="]
    assert complete(f"{lead}se") == ["search.", "search=", "seed=", "sensitivity.", "sensitivity="]
    assert complete(f"{lead}+experiment=int8_") == ["+experiment=int8_int16", "+experiment=int8_int16_fp16"]
    assert complete(f"{lead}task=d") == ["task=detection", "task=digits", "task=dual"]
    assert complete(f"{lead}task=digits --js") == ["--json"]


OWN_WORDS = {
    "compare --ch": ["--check"],
    "promote --dr": ["--dry-run"],
    "promote rollb": ["rollback", "rollback="],
    "export fr": ["from="],
    "export im": ["import="],
    "export target=pl": ["target=plugin", "target=plugin35"],
    "export target=hmct,o": ["target=hmct,onnx"],
    "cost fi": ["fit"],
    "analyze stages=[badcase,l": ["stages=[badcase,layers"],
    "compare tracking=": [],
    "promote objective=": [],
    "export +exp": [],
    "tune +experiment=train": [],
}


@pytest.mark.parametrize("line", OWN_WORDS)
def test_words_and_values_of_a_command_are_completed_and_no_group_that_it_refuses(line):
    assert complete(f"qflow {line}") == OWN_WORDS[line]


def test_the_values_are_those_of_the_code():
    assert COMMANDS["export"].values["target"] == tuple(TARGETS)
    stages = next(key.text for key in keys("analyze") if key.path == "stages")
    assert all(stage in stages for stage in COMMANDS["analyze"].values["stages"])


def test_a_module_is_completed_by_its_command():
    assert complete("python -m qflow.an") == ["qflow.analyze"]
    assert complete("python -m pytest.") == [] == complete("qflow nothing ")


@pytest.mark.slow
def test_bash_completes_both_forms(tmp_path):
    (tmp_path / "qflow").write_text(f'#!/bin/sh\nexec {sys.executable} -m qflow "$@"\n')
    (tmp_path / "qflow").chmod(0o755)
    ask = SCRIPTS["bash"] + (
        'ask() { COMP_LINE="$1"; COMP_POINT=${#1}; _qflow "${1%% *}"; echo "${COMPREPLY[*]}"; }\n'
        'ask "qflow tune task=di"; ask "python -m qflow.tune search.n_t"; ask "python -m pip"'
    )
    env = {**os.environ, "PATH": f"{tmp_path}:{os.path.dirname(sys.executable)}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", ask], env=env, capture_output=True, text=True, timeout=120)
    assert done.stdout.splitlines() == ["digits", "search.n_trials=", ""], done.stderr
