"""Commands as a user starts them, each a process of its own that has torch, MLflow and qflow loaded already.

They are forked from a server that did nothing but import, so a test waits for what the command does, not four seconds
for imports, and they share what is built once a session (built_once.py). What a new interpreter does itself (start-up,
signals) is tested on real ones in commands/test_tune.py.
"""

import atexit
import gc
import multiprocessing
import os
import runpy
import sys
import time
from pathlib import Path
from subprocess import CompletedProcess

from support import built_once

from qflow.config.command_table import COMMANDS

TESTS = Path(__file__).parents[1]
OWN_CODE = f"{TESTS / 'support'}:{TESTS}"
"""PYTHONPATH of a user whose task is support/user_task.py."""
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    ["torch._dynamo", "mlflow.store.tracking.sqlalchemy_store", "optuna", "hydra.main", "pandas", "sklearn.datasets"]
    + ["matplotlib.pyplot", "scipy.optimize", "mlflow.store.artifact.local_artifact_repo", "sqlalchemy.dialects.sqlite"]
    + ["qflow.study.baselines", "qflow.study.finish", "qflow.study.unrepaired", "qflow.report.analysis_files"]
    + [f"qflow.commands.{name}" for name in COMMANDS]
)


def run_qflow(name, *arguments, cwd, killed_after="", **env):
    """What `python -m qflow.<name> <arguments>` printed, and its exit code.

    With `killed_after` the process gets a SIGKILL as soon as that text is among what it has printed.
    """
    files = [Path(cwd) / f".{name}.{stream}" for stream in ("stdout", "stderr")]
    env = {**os.environ, "PYTHONPATH": OWN_CODE, "QFLOW_HOME": "", **env}
    process = _server.Process(target=_run, args=(name, arguments, str(cwd), env, files, built_once.folder))
    process.start()
    end = time.monotonic() + 300
    while killed_after and process.exitcode is None and time.monotonic() < end:
        if files[0].exists() and killed_after in files[0].read_text():
            process.kill()
        process.join(0.02)
    process.join(max(end - time.monotonic(), 0.0))
    if process.exitcode is None:
        process.kill()
        process.join()
    out, err = (file.read_text() for file in files)
    for file in files:
        file.unlink()
    return CompletedProcess(["-m", f"qflow.{name}", *arguments], process.exitcode, out, err)


def _run(name, arguments, cwd, env, files, folder):
    gc.freeze()  # else each collection goes through all that the server has loaded, and its pages are copied
    for number, file in enumerate(files, 1):
        with file.open("wb") as stream:
            os.dup2(stream.fileno(), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = [cwd, *env["PYTHONPATH"].split(":")]
    sys.argv = [name, *arguments]
    built_once.build_once(folder)
    try:
        runpy.run_module(f"qflow.{name}", run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # a process that multiprocessing forked leaves them out


OWN = [
    "+experiment=int8_int16", "task=custom", "task.name=own", "task.model._target_=user_task.model",
    "task.data._target_=user_task.Data", "task.metric._target_=user_task.ErrorRate", "task.batch_size=256",
    "calibration.batch_size=16", "calibration.steps=4", "sensitivity.bad_cases=4", "sensitivity.search_samples=32",
    "calibration.method=choice(minmax,mse)",
]  # fmt: skip


FREE_BOUNDARIES = "device.cost.boundary_ms=0"
"""In a network of a few small operators a conversion costs more than int8 saves: no mix would be the best."""
UNREPAIRED = [*OWN, "repair=none"]
"""For what a repair has no part in: half a second less a study."""
STORE = ["study=own/int8_int16", "tracking.experiment=own", "security.allow=[user_task]"]


def open_tracker(folder):
    from qflow.tracking.mlflow_tracker import MlflowTracker

    return MlflowTracker.open(None, folder / "qflow_out", "own")


def measured(tracker):
    """(metrics, tags) of the finished trials."""
    runs = [r for r in tracker.trial_runs("own/int8_int16") if r[2] == "FINISHED"]
    return [(tracker.run_metrics(run), tracker.run_tags(run)) for run, *_ in runs]


CUSTOM = [
    "task=custom", "task.name=own", "task.model._target_=user_task.model", "task.data._target_=user_task.Data",
    "task.metric._target_=user_task.ErrorRate", "calibration.batch_size=16", "calibration.steps=2",
]  # fmt: skip
