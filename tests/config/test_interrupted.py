"""Ctrl-C and SIGTERM at the beginning of a command."""

import os
import signal
import subprocess
import sys

import pytest


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("module", ["qflow.commands.tune", "omegaconf", "hydra.core.plugins"])
def test_a_command_that_is_interrupted_while_it_imports_ends_with_one_line(tmp_path, number, module):
    """The signal comes at the import of a module: before the frame of the command, in it, and while it composes."""
    (tmp_path / "sitecustomize.py").write_text(
        "import os, sys\n"
        "class Signal:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        f"        if name == {module!r}:\n"
        "            sys.meta_path.remove(self)\n"
        f"            os.kill(os.getpid(), {int(number)})\n"
        "sys.meta_path.insert(0, Signal())\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]), "QFLOW_HOME": str(tmp_path / "out")}
    command = [sys.executable, "-m", "qflow.tune", "+experiment=int8"]
    ended = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stderr.count("\n")) == (130, 1), ended.stderr
    assert ended.stderr.startswith("qflow: Interrupted.")
    assert not (tmp_path / "out").exists()
