"""Wrong values at every command end in one line and code 2 before anything is built.

The cases are bad_inputs.txt: a command line as in a shell, and below it what the command prints. They run in this
process, through the function that each command's module runs.
"""

import importlib
import shlex
import sys
from pathlib import Path

import pytest
from support.bad_files import write_bad_files

from qflow.config.command_table import COMMANDS

pytestmark = pytest.mark.slow  # imports MLflow, and composes a configuration for each case

LINES = Path(__file__).with_name("bad_inputs.txt").read_text().splitlines()
CASES = dict(zip(LINES[::2], LINES[1::2], strict=True))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of files that are not what a command asks for, and a store without a study."""
    import qflow.study.assemble  # noqa: F401  # what a process imports counts in no case
    from qflow.tracking.mlflow_tracker import MlflowTracker

    made = tmp_path_factory.mktemp("bad")
    write_bad_files(made)
    MlflowTracker.open(None, made / "store", "own")
    return made


def run(line, capsys):
    """Exit code and standard error of a command line."""
    _, program, *words = shlex.split(line)
    name = words.pop(0) if words and words[0] in COMMANDS else program.removeprefix("qflow")
    home = "qflow.workflows" if name == "train_float" else "qflow.commands"
    sys.argv = ["qflow", *words]
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(f"{home}.{name or 'main'}").main()
    return stop.value.code, capsys.readouterr().err


@pytest.mark.parametrize("line", CASES)
def test_a_wrong_value_gets_its_line_and_code_2(line, folder, capsys, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setenv("QFLOW_HOME", "")
    code, error = run(line, capsys)
    assert (code, error) == (2, CASES[line].replace("FOLDER", str(folder)) + "\n")


def test_the_cases_are_of_every_command():
    of = [shlex.split(line)[2] for line in CASES if line.startswith("$ qflow ")]
    assert len(CASES) >= 150 and set(COMMANDS) <= set(of)
