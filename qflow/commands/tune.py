"""python -m qflow.tune +experiment=int8_int16: tune the precision mix of a model, every trial tracked.

Exit code 0: the goal is met; 1: it is not (the nearest miss is named); 2: a mistake in the command line
or configuration.
"""

from __future__ import annotations

import importlib
import importlib.util
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qflow.config.command import Result, run_command
from qflow.config.json_output import known_so_far
from qflow.core.errors import ConfigError
from qflow.core.nearest import did_you_mean

if TYPE_CHECKING:
    from omegaconf import DictConfig

STARTED = time.perf_counter()


def main() -> None:
    """Entry point."""
    run_command("tune", tune)


def tune(config: DictConfig) -> Result:
    """Check everything that needs no model, open the study, and run the workflow between beginning and end.

    A budget that is spent ends the workflow, never the study: what is known by then is printed as usual.
    """
    from qflow.config.settings import required
    from qflow.study.checks import check_study

    workflow = find_workflow(required(config, "workflow"))
    check_study(config)
    from qflow.search.strategies import BudgetSpent
    from qflow.study.finish import finish
    from qflow.study.result import study_record
    from qflow.study.stages import begin
    from qflow.study.start import open_session
    from qflow.study.train_stage import train_nearest

    with open_session(config, STARTED) as session, known_so_far(lambda: study_record(session)):
        begin(session)
        try:
            workflow.run(session)
        except BudgetSpent as spent:
            session.console.say(f"{'budget':<12} {spent}")
        train_nearest(session)
        return finish(session)


def find_workflow(name: str) -> Any:
    """The module workflows/<name>.py. Raises ConfigError listing those that exist."""
    folder = importlib.util.find_spec("qflow.workflows")
    places = list(folder.submodule_search_locations or []) if folder else []
    names = sorted(p.stem for place in places for p in Path(place).glob("[a-z]*.py") if p.stem != "train_float")
    if name not in names:
        near = did_you_mean(name, names)
        raise ConfigError(f"A workflow is a file in workflows/, but got {name!r}.{near} There are: {', '.join(names)}.")
    return importlib.import_module(f"qflow.workflows.{name}")
