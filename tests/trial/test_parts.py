"""Parts of an analysis that other processes compute: the tables are those of one process, number for number.

The other process is an evaluator of its own here, and everything between the two goes through JSON.
"""

import json
from dataclasses import dataclass, field, replace

import pytest
import torch

from qflow.analysis.badcases.files import BadcaseInputs
from qflow.core.dtype import QDtype
from qflow.core.errors import TrialError
from qflow.core.repair_settings import RepairSettings
from qflow.cost_model.model import CostModel
from qflow.trial.evaluator import Evaluator
from qflow.trial.parts import Answering


@pytest.fixture
def make(digits_task, nash_m):
    def made(**settings):
        evaluator = Evaluator(digits_task, nash_m, CostModel(), eval_batch=256)
        small = {"search_samples": 60, "bad_cases": 12, **settings}
        evaluator.sensitivity_settings = replace(evaluator.sensitivity_settings, **small)
        evaluator.default_calibration = replace(evaluator.default_calibration, batch_size=8, steps=2)
        return evaluator

    return made


@dataclass
class Answered:
    answer: str

    def result(self):
        return json.loads(self.answer)


@dataclass
class Apart:
    """Answers as worker processes do."""

    evaluator: Evaluator
    workers: int = 2
    asked: list[str] = field(default_factory=list)

    def __post_init__(self):
        self.answering = Answering(self.evaluator.answering)

    def ask(self, task):
        self.asked.append(task["about"]["stage"])
        return Answered(json.dumps(self.answering(json.loads(json.dumps(task)))))


@pytest.mark.parametrize(
    "settings", [{"method": "exact"}, {"method": "screened", "draws": 1}, {"metric": "SQNR"}], ids=str
)
def test_workers_give_the_tables_of_one_process(make, settings):
    alone, driver = make(**settings), make(**settings)
    workers = driver.workers = Apart(make(**settings))
    assert driver.find_badcases() == alone.find_badcases()
    assert driver.rank() == alone.rank()
    assert workers.asked == ["bad cases"] * 7 + ["sensitivity"] * 8
    mix = alone.template(QDtype.qint16)[1]
    assert driver.find_badcases(applied=mix) == alone.find_badcases(applied=mix)
    assert driver.rank(applied=mix) == alone.rank(applied=mix)


def test_workers_repair_what_the_study_has_repaired(make):
    alone, driver = make(), make()
    workers = driver.workers = Apart(make())
    for evaluator in (alone, driver):
        evaluator.default_repair = RepairSettings(rounding=True, samples=64)
        assert evaluator.repair().changed
    assert driver.find_badcases() == alone.find_badcases()
    assert driver.rank() == alone.rank()
    own = workers.evaluator
    assert own.weights.digest == driver.weights.digest != ""
    workers.answering.leave()  # as before a trial
    assert own.weights.digest == ""


def test_the_inputs_of_bad_cases_are_read_when_workers_have_found_them(make):
    alone, driver = make(), make()
    driver.workers = Apart(make())
    tables, kept = [], []
    for evaluator in (alone, driver):
        kept.append(BadcaseInputs())
        tables.append(evaluator.find_badcases(inputs=kept[-1]))
    assert tables[0] == tables[1]
    assert kept[0].samples.keys() == kept[1].samples.keys()
    torch.testing.assert_close(kept[0].samples, kept[1].samples, rtol=0, atol=0)


class Dead:
    """A worker that has died, as often as it was tried."""

    def result(self):
        raise TrialError("A worker lives until its task is done, but got SIGKILL.")


def test_what_no_worker_answers_the_study_computes_itself_and_says_why(make):
    alone, driver, lines = make(), make(), []
    driver.cache.say = lines.append
    workers = driver.workers = Apart(make())
    ask, asked = workers.ask, []
    workers.ask = lambda task: Dead() if asked.append(1) or len(asked) in (3, 8) else ask(task)  # one of each analysis
    assert driver.find_badcases() == alone.find_badcases()
    assert driver.rank() == alone.rank()
    assert [line.split()[:2] for line in lines] == [["bad", "cases"], ["sensitivity", "computed"]]
    assert all("computed by the study's own process: A worker lives until" in line for line in lines)


def test_a_search_that_workers_have_ended_goes_on_from_its_state(make, tmp_path):
    settings = {"search_samples": 160, "bad_cases": 4}  # 20 steps: long enough for a state
    alone, tables = make(**settings), []
    for _ in range(2):  # the second finds the state of the first, and no cache
        driver = make(**settings)
        driver.searches, driver.workers = tmp_path, Apart(make(**settings))
        tables.append(driver.find_badcases())
        assert len(driver.workers.asked) == (0 if len(tables) == 2 else 19)
    assert tables == [alone.find_badcases()] * 2
