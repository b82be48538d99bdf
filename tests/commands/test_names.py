"""`qflow.check` and `qflow.cost` are functions of the library, `python -m qflow.check` and `-m qflow.cost` commands."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow  # starts processes of their own

BOTH_IN_ONE_PROCESS = """
import sys, torch, qflow
from torch import nn
from qflow.commands import analyze, check, cost, promote, tune  # what the commands are made of
from qflow.cost_model import latency

sys.argv = ["check", "--help"]
try:
    check.main()
except SystemExit as stop:
    assert not stop.code, stop.code
model, images = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3)).eval(), torch.randn(2, 3, 16, 16)
prepared = qflow.prepare(model, images, qconfig_setter=qflow.default_calibration_qconfig_setter, march="nash-m")
qflow.calibrate(prepared, [images])
assert [row.op for row in qflow.check(prepared).rows] and qflow.cost(prepared).latency_ms > 0
print(type(qflow.check).__name__, type(qflow.cost).__name__)
"""


def test_functions_stay_functions_after_a_command_ran_in_the_process(tmp_path):
    done = subprocess.run([sys.executable, "-c", BOTH_IN_ONE_PROCESS], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "function function"


@pytest.mark.parametrize("name", ["check", "cost"])
def test_the_same_name_is_a_command(name, tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", f"qflow.{name}", "--help"], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert f"python -m qflow.{name}" in done.stdout
