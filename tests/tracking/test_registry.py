"""The registry: versions count up, the alias moves and goes back, of equal claims one wins, names are checked."""

from __future__ import annotations

import os
import signal
from functools import partial

import pytest

from qflow.core.errors import ConfigError, PromotionError, TrackingError
from qflow.tracking.model_files import Logged, logged_model
from qflow.tracking.registry import BEFORE, CLAIM, champion, move_back, register

pytestmark = pytest.mark.slow  # real stores on disk


@pytest.fixture
def upload(tracker, tmp_path):
    """A function that uploads a model as the result of a new trial."""
    parent = tracker.open_study("s", tags={}, params={}, description="")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "MLmodel").write_text("flavors: {}\n")

    def made(number: int) -> Logged:
        run = tracker.start_trial(parent, "s", number, "")
        with logged_model(tracker, tmp_path / "model", "m", run, {"digest": "ab"}) as model:
            return model

    return made


def test_the_alias_moves_and_goes_back(tracker, open_tracker, upload):
    first, second = upload(0), upload(1)
    assert champion(tracker, "model", "champion") is None
    assert register(tracker, "model", first, "champion", None, {"digest": "ab"}, "First.") == 1
    one = champion(tracker, "model", "champion")
    assert (one.number, one.run_id) == (1, first.run_id)
    assert champion(tracker, "model", "candidate") is None
    assert register(tracker, "model", second, "candidate", None, {}, "") == 2
    assert champion(tracker, "model", "champion").number == 1
    assert register(tracker, "model", second, "champion", one, {}, "") == 3
    assert champion(open_tracker(), "model", "champion").number == 3
    assert register(tracker, "other", second, "champion", None, {}, "") == 1
    made = tracker.client.get_model_version("model", "1")
    assert (made.tags, made.description) == ({"digest": "ab", CLAIM: "", BEFORE: ""}, "First.")
    assert made.source == first.address
    left, now = move_back(tracker, "model", "champion", {"why": "slow"})
    assert (left.number, now.number, champion(tracker, "model", "champion").number) == (3, 1, 1)
    assert tracker.client.get_model_version("model", "3").tags["why"] == "slow"
    with pytest.raises(PromotionError, match="is version 1, the first"):
        move_back(tracker, "model", "champion", {})


def test_an_alias_that_another_promotion_moved_is_left(tracker, upload):
    assert register(tracker, "model", upload(0), "champion", None, {}, "") == 1
    with pytest.raises(PromotionError, match="gave champion of model to version 1"):
        register(tracker, "model", upload(1), "champion", None, {}, "")  # it was judged before there was one
    assert champion(tracker, "model", "champion").number == 1


def test_of_equal_claims_the_first_wins(tracker, upload):
    """The other one has created its version and not moved the alias yet."""
    rival = upload(0)
    tracker.client.create_registered_model("model")
    tracker.client.create_model_version("model", rival.address, tags={CLAIM: "champion after "})
    with pytest.raises(PromotionError, match="to version 1"):
        register(tracker, "model", upload(1), "champion", None, {}, "")
    assert champion(tracker, "model", "champion") is None
    tracker.client.set_model_version_tag("model", "1", CLAIM, "")  # withdrawn
    tracker.client.set_model_version_tag("model", "2", CLAIM, "")
    assert register(tracker, "model", upload(2), "champion", None, {}, "") == 3


def test_what_a_killed_promotion_has_left_is_in_nobodys_way(tracker, open_tracker, upload, tmp_path):
    first = upload(0)
    if not (child := os.fork()):
        other = open_tracker()
        other.client.create_registered_model("model")
        made = partial(os.kill, os.getpid(), signal.SIGKILL)
        other.client.set_registered_model_alias = lambda *_: made()
        with logged_model(other, tmp_path / "model", "m", first.run_id, {}) as model:
            other.client.finalize_logged_model(model.model_id, "PENDING")
            register(other, "model", model, "champion", None, {}, "")
    os.waitpid(child, 0)
    assert tracker.client.get_model_version("model", "1").tags[CLAIM].startswith("champion after  by {")
    with logged_model(tracker, tmp_path / "model", "m", first.run_id, {}) as model:
        assert register(tracker, "model", model, "champion", None, {}, "") == 2
    assert champion(tracker, "model", "champion").number == 2
    experiment = [tracker.experiment_id]
    states = {m.status for m in tracker.client.search_logged_models(experiment)}
    assert states == {"READY", "FAILED"}


def test_a_model_whose_upload_is_interrupted_right_after_it_was_made_is_marked_as_failed(tracker, upload, tmp_path):
    run, created = upload(0).run_id, tracker.client.create_logged_model

    def interrupted(*arguments, **terms):
        created(*arguments, **terms)
        raise KeyboardInterrupt

    tracker.client.create_logged_model = interrupted
    with pytest.raises(KeyboardInterrupt), logged_model(tracker, tmp_path / "model", "m", run, {}):
        pass
    assert {m.status for m in tracker.client.search_logged_models([tracker.experiment_id])} == {"READY", "FAILED"}


@pytest.mark.parametrize("alias", ["latest", "LATEST", "v1", "V22", "", "a b", "a/b"])
def test_reserved_and_impossible_aliases_are_refused(tracker, alias):
    for call in (
        lambda: champion(tracker, "model", alias),
        lambda: register(tracker, "model", Logged("m-1", "0" * 32, "nowhere"), alias, None, {}, ""),
    ):
        with pytest.raises(ConfigError, match="An alias is") as got:
            call()
        assert "\n" not in str(got.value)


def test_a_run_that_is_not_there_is_refused(tracker, tmp_path):
    with pytest.raises(TrackingError), logged_model(tracker, tmp_path, "m", "0" * 32, {}):
        pass
