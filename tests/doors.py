"""Doors as a user starts them, each a process of its own that has torch and MLflow loaded already.

They are forked from a server that did nothing but import, so a test waits for what the door does, not three seconds
for imports. What a new interpreter does itself (start-up, signals) is tested on real ones in test_doors.py.
"""

import atexit
import multiprocessing
import os
import runpy
import sys
from pathlib import Path
from subprocess import CompletedProcess

HERE = Path(__file__).parent
_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(
    ["torch._dynamo", "mlflow.store.tracking.sqlalchemy_store", "optuna", "hydra.main", "pandas", "sklearn.datasets"]
    + ["matplotlib.pyplot", "plotly.graph_objects", "scipy.optimize"]
)


def door(name, *arguments, cwd, **env):
    """What `python -m qflow.<name> <arguments>` printed, and its exit code."""
    files = [Path(cwd) / f".{name}.{stream}" for stream in ("stdout", "stderr")]
    env = {**os.environ, "PYTHONPATH": str(HERE), "QFLOW_HOME": "", **env}
    process = _server.Process(target=_run, args=(name, arguments, str(cwd), env, files))
    process.start()
    process.join(300)
    if process.exitcode is None:
        process.kill()
        process.join()
    out, err = (file.read_text() for file in files)
    for file in files:
        file.unlink()
    return CompletedProcess(["-m", f"qflow.{name}", *arguments], process.exitcode, out, err)


def _run(name, arguments, cwd, env, files):
    for number, file in enumerate(files, 1):
        with file.open("wb") as stream:
            os.dup2(stream.fileno(), number)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.path[:0] = [cwd, *env["PYTHONPATH"].split(":")]
    sys.argv = [name, *arguments]
    try:
        runpy.run_module(f"qflow.{name}", run_name="__main__", alter_sys=True)
    finally:
        atexit._run_exitfuncs()  # a process that multiprocessing forked leaves them out
