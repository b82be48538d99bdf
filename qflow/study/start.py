"""The start of a study: it opens tracker, evaluator and Optuna study, the part that fails fastest first."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial

from omegaconf import DictConfig

from qflow.config.settings import patience, root_dir, trial_settings
from qflow.config.space import search_space
from qflow.core.errors import TrackingError
from qflow.quant.train.teacher import require_comparable
from qflow.report.console import Console
from qflow.search.domain import Domain
from qflow.search.study import Study
from qflow.study.assemble import make_evaluator, study_goal
from qflow.study.feasible import within_data
from qflow.study.identity import foresee, foresee_settings
from qflow.study.report import report_lines
from qflow.study.session import Session
from qflow.tracking.ended import end_abandoned
from qflow.tracking.limits import check_metric_name
from qflow.tracking.mlflow_tracker import MlflowTracker
from qflow.trial.evaluator import Evaluator
from qflow.trial.training import check_training


@contextmanager
def open_session(config: DictConfig, started: float) -> Iterator[Session]:
    """Open the session of a study; the study's run is always ended with the block.

    The tracking store is opened first, because an unusable one fails in seconds. `started` is the
    `time.perf_counter()` from which the console counts.
    """
    root = root_dir(config)
    tracker = MlflowTracker.open(config.tracking.uri, root, config.tracking.experiment, patience(config))
    foresee(config.study, tracker, root, config.search.storage)
    end_abandoned(tracker)
    evaluator = make_evaluator(config)
    check_metric_name(evaluator.task.metric_name)
    space = search_space(config)
    _check_training(config, evaluator, space)
    goal = study_goal(config, evaluator.task)
    space, left_out = within_data(space, evaluator.task)
    study = Study.open(
        config.search.storage or root,
        config.study,
        locks=root,
        space=space,
        directions=tuple(goal.optimize.values()),
        sampler=config.search.sampler,
        seed=config.seed,
        n_trials=config.search.n_trials,
        metrics=list(goal.optimize),
        patient=partial(tracker.patience.call, config.search.storage),
    )
    foresee_settings(study, tracker, root, config)
    session = Session(config, evaluator, goal, Console(started=started), tracker, study, root)
    _speak_on(session.console, tracker, study, {"space": left_out, "engine": evaluator.engine.news()})
    evaluator.keep_in(root / "cache", session.console.say)
    with session.stack:
        status = "FAILED"
        try:
            yield session
            status = "FINISHED"
        except KeyboardInterrupt:
            status = "KILLED"
            raise
        finally:
            if session.study_run:
                with nullcontext() if status == "FINISHED" else suppress(TrackingError):  # the first error counts
                    if session.driver is not None:
                        session.driver.spool.still_owned()  # else another start has the study, and its run is not ended
                    tracker.end(session.study_run, status)
                if status == "KILLED" and session.trials:
                    session.console.say(report_lines(session))


def _check_training(config: DictConfig, evaluator: Evaluator, space: Mapping[str, Domain]) -> None:
    """Raise ConfigError or DataError for a training that cannot run. Each trial checks one that is searched."""
    qat = trial_settings(config).qat
    if not evaluator.training or not qat.steps or any(key.startswith("qat.") for key in space):
        return
    check_training(evaluator.task, evaluator.training, qat)
    if qat.teacher.features:  # which of them the quantized model shares, its fusion decides
        require_comparable(evaluator.prepared, qat.teacher, qat.mode)


def _speak_on(console: Console, tracker: MlflowTracker, study: Study, news: Mapping[str, Sequence[str]]) -> None:
    """Let the console say what the tracking store does, and `news` by what they are about."""
    tracker.patience.say = console.say
    if study.shared:
        tracker.patience.why = "other folders may continue a study with a search.storage"
    for about, texts in news.items():
        for text in texts:
            console.say(f"{about:<12} {text}")
