"""A start continues the study that it names, or is refused before it writes anything."""

import pytest
from support.harness import SPACE

from qflow.core.errors import ConfigError, TrackingError
from qflow.core.record import to_json
from qflow.search.study import Study
from qflow.study.identity import identity_tags, require_same
from qflow.tracking.lease import owned
from qflow.tracking.mlflow_tracker import MlflowTracker

pytestmark = pytest.mark.slow  # real stores on disk

STATE = {"weights": "a1"}


@pytest.fixture
def tracker(tmp_path):
    return MlflowTracker.open(None, tmp_path / "store", "experiment")


def search(folder):
    folder.mkdir(exist_ok=True)
    return Study.open(folder, "net/stage", space=SPACE, directions=("minimize",))


def opened(tracker, study, folder):
    tags = {"qflow.fingerprint": to_json(STATE), **identity_tags(study, folder)}
    return tracker.open_study(study.name, tags=tags, params={}, description="")


def test_two_folders_with_one_store_are_two_studies(tracker, tmp_path):
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    study = search(here)
    require_same(study, tracker, here, STATE)
    opened(tracker, study, here)
    require_same(search(here), tracker, here, STATE)
    with pytest.raises(TrackingError, match=rf"from the folder that holds its search, but got net/stage of \S+{here}"):
        require_same(search(elsewhere), tracker, elsewhere, STATE)


def test_other_settings_are_refused_once_a_trial_has_a_result(tracker, tmp_path):
    study = search(tmp_path)
    opened(tracker, study, tmp_path)
    require_same(study, tracker, tmp_path, {"weights": "b2"})
    number = study.ask().number
    study.complete(number, (0.5,))
    with pytest.raises(ConfigError, match="keeps the settings .* weights: a1 -> b2"):
        require_same(study, tracker, tmp_path, {"weights": "b2"})


def test_of_two_runs_made_at_the_same_moment_one_is_kept(tracker, tmp_path, monkeypatch):
    first = tracker.create_study("net/stage")
    real = MlflowTracker.find_study
    answers = iter([None])  # the second start looked just before the first one made its run
    monkeypatch.setattr(MlflowTracker, "find_study", lambda self, name: next(answers, real(self, name)))
    with owned(tracker, "net/stage", tmp_path):
        runs = tracker.client.search_runs([tracker.experiment_id])
        assert [run.info.run_id for run in runs] == [first]
