"""python -m qflow.report study=<name>: render the report of a study again, from its runs alone.

Neither the model nor the data is needed, and a study that runs or was interrupted has a report too. Exit code 0:
written; 2: a mistake in the command line, or an unknown study.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from qflow.config.command import run_command
from qflow.config.settings import root_dir

if TYPE_CHECKING:
    from omegaconf import DictConfig


def main() -> None:
    """Entry point."""
    run_command("report", report)


def report(config: DictConfig) -> int:
    """Write the report of `config.study` to disk and to its run, and print where it is."""
    from qflow.study.report import report_url, write_report
    from qflow.tracking.mlflow_tracker import MlflowTracker

    root = root_dir(config)
    tracker = MlflowTracker.open(config.tracking.uri, root, config.tracking.experiment)
    place = write_report(tracker, config.study, root)
    run = tracker.find_study(config.study)
    print(f"{'report':<12}{place}")
    print(f"{'in MLflow':<12}{report_url(tracker, run or '')}")
    return 0
