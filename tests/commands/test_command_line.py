"""The one command line as a user meets it: processes of their own, on a terminal and in a script."""

import json
import os
import pty
import subprocess
import sys
import time

import pytest
from support.documents import document

from qflow.config.command_table import COMMANDS
from qflow.core.version import VERSION

pytestmark = pytest.mark.slow  # starts commands as processes of their own


def qflow(*arguments, cwd):
    return subprocess.run(
        [sys.executable, "-m", *arguments], cwd=cwd, capture_output=True, text=True, timeout=300,
        env={**os.environ, "QFLOW_HOME": ""},
    )  # fmt: skip


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_both_forms_of_a_command_give_the_same_help(name, tmp_path):
    one, other = (qflow(*form, "--help", cwd=tmp_path) for form in (("qflow", name), (f"qflow.{name}",)))
    assert (one.returncode, other.returncode) == (0, 0), one.stderr + other.stderr
    assert one.stdout.replace(f"qflow {name}", f"python -m qflow.{name}").split() == other.stdout.split()
    assert not list(tmp_path.iterdir())


def test_the_program_alone_lists_the_commands_and_knows_its_version(tmp_path):
    assert qflow("qflow", cwd=tmp_path).stdout == qflow("qflow", "--help", cwd=tmp_path).stdout
    assert qflow("qflow", "--version", cwd=tmp_path).stdout == f"qflow {VERSION}\n"


WRONG = {
    "tun": f"qflow: A command is one of {', '.join(COMMANDS)}, but got tun. Did you mean tune?\n",
    "xyzzy": f"qflow: A command is one of {', '.join(COMMANDS)}, but got xyzzy.\n",
    "--completion bahs": "qflow: A shell is one of bash, zsh, fish, but got bahs. Did you mean bash? "
    'In bash: eval "$(qflow --completion bash)".\n',
}


@pytest.mark.parametrize("line", WRONG)
def test_a_mistyped_command_gets_one_line_and_code_2(line, tmp_path):
    done = qflow("qflow", *line.split(), cwd=tmp_path)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", WRONG[line])


def test_a_script_gets_one_document_for_a_result_and_for_a_mistake(tmp_path):
    done = qflow("qflow", "cost", "--json", "task=digits", "+task.model.epochs=0", cwd=tmp_path)
    found = document(done)
    assert (found["schema"], found["command"], found["error"]) == ("qflow.cost/2", "cost", None)
    assert found["meaning"] == COMMANDS["cost"].meaning(done.returncode)
    assert found["result"]["metrics"]["cost/latency_ms"] > 0
    assert "written" in done.stderr, "what is printed for people goes to stderr"
    wrong = qflow("qflow.check", "n_trials=3", "--json", cwd=tmp_path)
    found = document(wrong)
    assert (found["exit_code"], found["result"], found["error"]["type"]) == (2, {}, "ConfigError")
    assert wrong.stderr == f"qflow: {found['error']['line']}\n"
    assert found["error"]["rule"] == "A key must exist in the configuration" and found["error"]["got"] == "n_trials"
    assert found["error"]["way_out"].startswith("Did you mean search.n_trials?")


@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("qflow cost --json --cfg nothing", 2),
        ("qflow cost --json --hydra-help", 0),
        ("qflow.cost --json --nothing", 2),
        ("qflow frobnicate --json", 2),
        ("qflow --version --json", 0),
    ],
)
def test_whatever_ends_a_command_leaves_a_document(line, code, tmp_path):
    done = qflow(*line.split(), cwd=tmp_path)
    found = json.loads(done.stdout)
    assert (found["exit_code"], done.returncode, bool(found["error"])) == (code, code, code == 2), done.stderr
    if found["command"] in COMMANDS:
        document(done)


def test_the_debug_mode_keeps_document_and_code(tmp_path, monkeypatch):
    monkeypatch.setenv("QFLOW_DEBUG", "1")
    done = qflow("qflow.cost", "nothing=3", "--json", cwd=tmp_path)
    found = json.loads(done.stdout)
    assert (found["exit_code"], done.returncode) == (2, 2) and "Traceback" in done.stderr
    assert done.stderr.endswith(f"qflow: {found['error']['line']}\n")


@pytest.mark.parametrize("name", sorted(COMMANDS))
def test_a_terminal_shows_what_is_done_before_anything_heavy_is_imported(name, tmp_path):
    """The line comes before Hydra, OmegaConf and NumPy; a wrong key then ends the command."""
    main, side = pty.openpty()
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", f"qflow.{name}", "nothing=1"], cwd=tmp_path, stdout=side, stderr=subprocess.DEVNULL
    )
    os.close(side)
    first = os.read(main, 200).decode()
    assert first.startswith(f"{name:<12} {COMMANDS[name].summary}"), first
    assert time.perf_counter() - began < 5.0, "under one second on a machine that does nothing else"
    assert process.wait(60) == 2
    os.close(main)
