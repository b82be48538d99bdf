"""Runs my task through a whole study on a few samples, in less than a minute: pytest."""

import json
import subprocess
import sys
from pathlib import Path


def test_my_task_goes_through_a_study(tmp_path: Path) -> None:
    """The figures of so few samples mean nothing, but every part of the task is used."""
    study = ["+experiment=int8_int16", "+debug=tiny", "task=mine", f"root={tmp_path}", "--json"]
    folder = Path(__file__).parent
    done = subprocess.run([sys.executable, "-m", "qflow.tune", *study], cwd=folder, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr  # the goal is met, or missed; 2 is a mistake
    assert json.loads(done.stdout)["result"]["baselines"]
