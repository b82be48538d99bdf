"""Every experiment file, tiny: none rots."""

import os
import re
import subprocess
import sys

import pytest

from qflow.config.door import experiments


def run(*arguments, cwd):
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env={**os.environ, "QFLOW_HOME": ""}, capture_output=True, text=True,
        timeout=300,
    )  # fmt: skip


@pytest.mark.parametrize("experiment", experiments())
def test_experiments_run_on_the_real_task(experiment, tmp_path):
    """The built-in detector on 128 pictures: int8 misses the goal by night, int16 meets it, the mix costs less."""
    done = run(
        "-m", "qflow.tune", f"+experiment={experiment}", "+debug=tiny", "task.data.calibration_size=64",
        "+task.data.evaluation_size=128", "task.float_metric=null", "calibration.steps=4", "search.n_trials=4",
        "search.enqueue=[{qconfig.int16_ratio: 0.1}]", "executor.threads=1", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode in (0, 1), done.stdout + done.stderr
    drops = dict(re.findall(r"^(all-int16|all-int8) +0\.\d+ +([+-]0\.\d+)", done.stdout, re.MULTILINE))
    assert float(drops["all-int8"]) > 0.02 > float(drops["all-int16"])
    assert (tmp_path / "qflow_out" / "mlflow.db").exists()


def test_training_runs_in_miniature(tmp_path):
    from safetensors.torch import load_file

    done = run(
        "-m", "qflow.workflows.train_float", "+experiment=train_perception", "training.epochs=1",
        "task.data.calibration_size=9872", "+task.data.evaluation_size=64", "training.batch_size=32", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "stem.0.conv.weight" in load_file(tmp_path / "weights.safetensors")
