"""A start continues the study that it names, or is refused before it writes anything."""

import pytest
from support.compose import BASE, compose
from support.harness import SPACE

from qflow.core.errors import ConfigError, TrackingError
from qflow.core.record import to_json
from qflow.search.study import Study
from qflow.study.fingerprint import changes, settings_state
from qflow.study.identity import foresee, foresee_settings, identity_tags, require_same
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


def test_what_a_start_can_see_before_it_owns_the_study_is_refused_before_a_file_is_made(tracker, tmp_path):
    here, elsewhere = tmp_path / "here", tmp_path / "elsewhere"
    study = search(here)
    foresee("net/stage", tracker, here, None)
    with owned(tracker, "net/stage", here):
        with pytest.raises(TrackingError, match=f"while another drives it: .*folder {here}"):
            foresee("net/stage", tracker, elsewhere, None)
        opened(tracker, study, here)
    with pytest.raises(TrackingError, match="from the folder that holds its search"):
        foresee("net/stage", tracker, elsewhere, None)
    foresee("net/stage", tracker, here, None)
    assert not elsewhere.exists()


def test_another_setting_is_seen_before_the_model_is_run(tracker, tmp_path):
    config = compose(BASE, "root=here")
    study = search(tmp_path)
    tags = {"qflow.fingerprint": to_json(settings_state(config) | STATE), **identity_tags(study, tmp_path)}
    tracker.open_study(study.name, tags=tags, params={}, description="")
    study.complete(study.ask().number, (0.5,))
    foresee_settings(study, tracker, tmp_path, config)
    with pytest.raises(ConfigError, match="keeps the settings .* seed: 0 -> 5"):
        foresee_settings(study, tracker, tmp_path, compose(BASE, "root=here", "seed=5"))


@pytest.mark.parametrize("text", ["no JSON", "[1]", "null", "[" * 100_000], ids=range(4))
def test_a_fingerprint_that_qflow_did_not_write_is_one_line(text):
    with pytest.raises(TrackingError, match="as qflow wrote it, but got") as raised:
        changes(text, STATE)
    assert len(str(raised.value)) < 250
