"""python -m qflow.report study=<name>: render the report of a study again, from its runs alone.

Neither the model nor the data is needed, and a study that runs or was interrupted has a report too. Exit code 0:
written; 2: a mistake in the command line, or an unknown study.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qflow.config.command import Result, run_command

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main() -> None:
    """Entry point."""
    run_command("report", report)


def report(config: DictConfig) -> Result:
    """Write the report of `config.study` to disk and to its run, and print where it is."""
    from qflow.config.settings import patience, root_dir
    from qflow.study.find import one_study
    from qflow.study.report import report_url, write_report
    from qflow.tracking.artifacts import Store
    from qflow.tracking.mlflow_tracker import MlflowTracker

    root = root_dir(config)
    waiting = patience(config)
    store = Store.open(config.tracking.uri, root, waiting)  # a tracker would create what is missing
    experiment, run = one_study(store, config.study, config.tracking.experiment, "A report is of a study in the store")
    tracker = MlflowTracker.open(config.tracking.uri, root, experiment, waiting)
    place = write_report(tracker, config.study, run, root)
    print(f"{'report':<12}{place}")
    print(f"{'in MLflow':<12}{report_url(tracker, run)}")
    return 0, {"written": str(place), "run": run, "url": report_url(tracker, run)}
