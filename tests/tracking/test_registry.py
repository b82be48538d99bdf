"""The registry: versions count up, the alias moves, reserved names are refused."""

from __future__ import annotations

import pytest

from qflow.core.errors import ConfigError, TrackingError
from qflow.tracking.registry import champion, register

pytestmark = pytest.mark.slow  # real stores on disk


def trial(tracker, number: int) -> str:
    parent = tracker.open_study("s", tags={}, params={}, description="")
    return tracker.start_trial(parent, "s", number, "")


def test_the_alias_moves(tracker, open_tracker):
    first, second = trial(tracker, 0), trial(tracker, 1)
    assert champion(tracker, "model", "champion") is None
    assert register(tracker, "model", first, "qconfig", "champion", {"digest": "ab"}, "First.") == 1
    assert champion(tracker, "model", "champion") == (1, first)
    assert champion(tracker, "model", "candidate") is None
    assert register(tracker, "model", second, "qconfig", "candidate", {}, "") == 2
    assert champion(tracker, "model", "champion") == (1, first)
    assert register(tracker, "model", second, "qconfig", "champion", {}, "") == 2  # the same run, the same version
    assert champion(open_tracker(), "model", "champion") == (2, second)
    assert register(tracker, "other", second, "qconfig", "champion", {}, "") == 1
    made = tracker.client.get_model_version("model", "1")
    assert (made.tags, made.description, made.source) == (
        {"digest": "ab"},
        "First.",
        f"runs:/{first}/qconfig",
    )


@pytest.mark.parametrize("alias", ["latest", "LATEST", "v1", "V22", "", "a b", "a/b"])
def test_reserved_and_impossible_aliases_are_refused(tracker, alias):
    for call in (
        lambda: champion(tracker, "model", alias),
        lambda: register(tracker, "model", "0" * 32, "qconfig", alias, {}, ""),
    ):
        with pytest.raises(ConfigError, match="An alias is") as got:
            call()
        assert "\n" not in str(got.value)


def test_a_run_that_is_not_there_is_refused(tracker):
    with pytest.raises(TrackingError):
        register(tracker, "model", "0" * 32, "qconfig", "champion", {}, "")
