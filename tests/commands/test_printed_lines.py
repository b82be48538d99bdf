"""The lines that a study prints run as they stand, whatever its folder, experiment, study and model are called."""

import os
import shlex
import subprocess

import pytest
from support.commands import OWN, OWN_CODE, run_qflow

pytestmark = pytest.mark.slow  # starts commands as processes of their own


def paste(line, cwd):
    env = {**os.environ, "PYTHONPATH": f"{OWN_CODE}:{os.environ.get('PYTHONPATH', '')}", "QFLOW_HOME": ""}
    return subprocess.run(["bash", "-c", line], cwd=cwd, env=env, capture_output=True, text=True, timeout=300)


def test_the_promote_line_runs_whatever_the_names_are(tmp_path):
    folder = tmp_path / "it's 100%20 {v2} a%2Fb? & 車道"
    folder.mkdir()
    done = run_qflow(
        "tune", *OWN, "search.n_trials=2", "objective.max_drop=0.9", "study=own+1/a@b", "root='out 1?#'",
        "tracking.experiment=\"b's: \\\"車\\\" = #1 $x\"", "tracking.registered_model='a/b: c=d'", cwd=folder,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = (line for line in done.stdout.splitlines() if "-m qflow.promote" in line)
    pasted = paste(line.strip(), folder)
    assert pasted.returncode == 0, pasted.stdout + pasted.stderr
    assert "a-b- c=d version 1, alias champion moved" in pasted.stdout
    assert [p.name for p in folder.iterdir()] == ["out 1?#"]
    (ui,) = (line for line in done.stdout.splitlines() if "mlflow ui" in line)
    *_, option, uri = shlex.split(ui)
    (runs,) = (line for line in done.stdout.splitlines() if line.startswith("runs "))
    assert (option, uri) == ("--backend-store-uri", runs.removeprefix("runs").strip())
    bare = run_qflow("promote", "study=own+1/a@b", "root='out 1?#'", "security.allow=[user_task]", cwd=folder)
    assert bare.returncode == 0, bare.stdout + bare.stderr  # the experiment is found by the study
    assert "is this run already" in bare.stdout
