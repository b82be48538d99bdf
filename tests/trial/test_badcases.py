"""The search for bad cases on a task: a long one that is killed goes on, a short one reads what it was asked to."""

from dataclasses import replace

import pytest

from qflow.analysis.measures.metrics import Custom
from qflow.cost_model.model import CostModel
from qflow.trial.evaluator import Evaluator


@pytest.fixture
def make(digits_task, nash_m, tmp_path):
    def made(**settings):
        evaluator = Evaluator(digits_task, nash_m, CostModel(), eval_batch=256, searches=tmp_path / "searches")
        evaluator.sensitivity_settings = replace(evaluator.sensitivity_settings, **settings)
        evaluator.default_calibration = replace(evaluator.default_calibration, batch_size=8, steps=2)
        return evaluator

    return made


def test_a_search_that_is_killed_goes_on_where_its_state_is(make, monkeypatch):
    whole = make(search_samples=160, bad_cases=4)
    whole.searches = None
    expected = whole.find_badcases()

    def killed_at_18(step):
        if step == 18:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make(search_samples=160, bad_cases=4).find_badcases(killed_at_18)

    from qflow.analysis.badcases.search import Search

    compared, add = [], Search.add
    monkeypatch.setattr(Search, "add", lambda self, batch, size: (compared.append(size), add(self, batch, size))[1])
    assert make(search_samples=160, bad_cases=4).find_badcases() == expected
    assert compared == [8] * 4  # of 20 steps, 16 were saved
    assert make(search_samples=160, bad_cases=4).find_badcases() == expected
    assert compared == [8] * 4  # one that has ended is not repeated
    make(search_samples=160, bad_cases=3).find_badcases()
    assert len(compared) == 24  # another search


def test_as_many_samples_are_searched_as_were_asked_for(make):
    assert make(search_samples=20, bad_cases=4).find_badcases().samples == 20
    assert make(search_samples=100_000, bad_cases=4).find_badcases().samples == 512


def test_the_users_own_metric_chooses_the_bad_cases(make):
    evaluator = make(search_samples=64, bad_cases=4)
    first = evaluator.find_badcases()
    evaluator.own_metric = Custom(
        lambda x, y: (x - y).flatten(1).abs().sum(1), "ascending"
    )  # the best ones are the worst
    own = evaluator.find_badcases()
    assert (own.metric, set(own.chosen) & set(first.chosen)) == ("custom", set())
    assert evaluator.rank().metric == "L1"
