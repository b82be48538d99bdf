"""Studies of one trial in a real store, without the stages around it: what loading and promoting are tried on."""

import time

from support.compose import compose

from qflow.study.start import open_session

TINY = ["calibration.batch_size=8", "calibration.steps=2", "search.sampler=random"]


def store_trial(folder, *overrides, point=None, best=True):
    """A study with a trial at `point` in the store of `folder`: its run id and the evaluator."""
    config = compose("+experiment=int8_int16", f"root={folder}", *TINY, *overrides)
    with open_session(config, time.perf_counter()) as session:
        session.evaluator.measure_float()
        assert session.evaluator.prepared is not None
        session.open()
        trial = session.measure(point or {"qconfig.int16_ratio": 0.0})
        assert trial is not None
        if best:
            tags = {"qflow.best": trial.run_id, "qflow.goal": "met"}
            session.tracker.log_study(session.study_run, tags=tags)
    return trial.run_id, session.evaluator


def uri_of(folder):
    return f"sqlite:///{folder}/mlflow.db"
