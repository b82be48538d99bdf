"""Whatever a task's metrics depend on changes its identity, nothing else does, and every process computes the same."""

import functools
import subprocess
import sys
import threading
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from qflow.tasks.content_digest import ContentDigest
from qflow.tasks.identity import of_task, of_training
from qflow.tasks.task import make_task
from qflow.trial.training import Training

pytestmark = pytest.mark.slow  # starts processes

COUNT = 597


class Plain:
    """A metric whose parameter no representation shows."""

    direction = "maximize"

    def __init__(self, threshold=0.5):
        self.threshold = threshold

    def __call__(self, outputs, batch):
        return (outputs[:, 0] > self.threshold).float()


class Slotted(Plain):
    __slots__ = ("weight",)

    def __init__(self, weight):
        super().__init__()
        self.weight = weight


def above(outputs, batch, threshold=0.5):
    return (outputs[:, 0] > threshold).float()


def below(outputs, batch, threshold=0.5):
    return (outputs[:, 0] < threshold).float()


def partial(function, **arguments):
    made = functools.partial(function, **arguments)
    made.direction = "maximize"
    return made


def closure(threshold):
    def score(outputs, batch):
        return above(outputs, batch, threshold)

    score.direction = "maximize"
    return score


class Scaled:
    """Data whose model inputs follow an attribute."""

    def __init__(self, factor=1.0, pad=0.0):
        self.factor, self.pad = factor, pad
        generator = torch.Generator().manual_seed(0)
        images, labels = torch.rand(COUNT, 4, generator=generator), torch.arange(COUNT)
        self.calibration = self.evaluation = self.train = TensorDataset(images, labels)

    def model_inputs(self, batch):
        return (batch[0] * self.factor,)


def task(metric=None, data=None, model=None):
    torch.manual_seed(0)
    model = model or nn.Sequential(nn.Linear(4, 4), nn.LeakyReLU(0.1))
    return make_task(name="t", model=model.eval(), data=data or Scaled(), metric=metric or Plain())


def relabelled():
    data = Scaled()
    data.evaluation = TensorDataset(data.evaluation.tensors[0], data.evaluation.tensors[1].clone())
    data.evaluation.tensors[1][7] += 1
    return data


class Other(Scaled):
    def model_inputs(self, batch):
        return (batch[0].flip(1),)


def leaky(slope):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.LeakyReLU(slope))


PAIRS = {
    "parameter of a plain metric": ({"metric": Plain(0.5)}, {"metric": Plain(0.9)}),
    "slot of a metric": ({"metric": Slotted(1.0)}, {"metric": Slotted(2.0)}),
    "argument of a partial": ({"metric": partial(above, threshold=0.1)}, {"metric": partial(above, threshold=0.2)}),
    "function of a partial": ({"metric": partial(above, threshold=0.1)}, {"metric": partial(below, threshold=0.1)}),
    "value in a closure": ({"metric": closure(0.1)}, {"metric": closure(0.2)}),
    "one label": ({"data": Scaled()}, {"data": relabelled()}),
    "code of model_inputs": ({"data": Scaled()}, {"data": Other()}),
    "attribute that model_inputs reads": ({"data": Scaled(1.0)}, {"data": Scaled(2.0)}),
    "attribute that only larger batches show": ({"data": Scaled(pad=0.0)}, {"data": Scaled(pad=1.0)}),
    "model without its weights": ({"model": leaky(0.1)}, {"model": leaky(0.2)}),
}


@pytest.mark.parametrize(("one", "other"), PAIRS.values(), ids=PAIRS)
def test_what_metrics_depend_on_is_in_the_identity(one, other):
    assert of_task(task(**one)) == of_task(task(**one))
    assert of_task(task(**one)).content != of_task(task(**other)).content


def test_values_that_follow_from_the_rest_do_not_count():
    class Cached(Plain):
        @functools.cached_property
        def table(self):
            return torch.rand(3)

    looked_at = Cached()
    before = of_task(task(looked_at))
    assert looked_at.table is not None
    assert of_task(task(looked_at)) == before


def test_what_a_stateful_metric_has_summed_up_does_not_count():
    class Mean(Plain):
        total = 0.0

        def reset(self):
            self.total = 0.0

        update, compute = Plain.__call__, Plain.__call__

    metric = Mean()
    metric.reset()
    before = of_task(task(metric))
    metric.total = 3.0
    assert of_task(task(metric)) == before


def test_a_part_that_nothing_identifies_is_named():
    metric = Plain()
    metric.client = SimpleNamespace(lock=threading.Lock())
    assert of_task(task(metric)).unidentified == ("task.metric.client.lock (lock)",)
    data = Scaled()
    data.lock = threading.Lock()  # it speaks through the samples
    assert of_task(task(data=data)).unidentified == ()


def test_random_numbers_are_left_alone_and_augmented_splits_have_one_identity():
    class Augmented(TensorDataset):
        def __getitem__(self, index):
            return self.tensors[0][index] + torch.rand(1), self.tensors[1][index]

    data = Scaled()
    data.train = Augmented(*data.evaluation.tensors)
    before = torch.get_rng_state()
    first, again = (of_training(task(data=data), Training(above, torch.optim.SGD)) for _ in range(2))
    assert first == again
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    "other",
    [Training(below, torch.optim.SGD), Training(above, functools.partial(torch.optim.SGD, momentum=0.9)),
     Training(above, torch.optim.AdamW),
     Training(above, torch.optim.SGD, functools.partial(torch.optim.lr_scheduler.StepLR, step_size=2))],
)  # fmt: skip
def test_a_training_knows_loss_optimizer_and_scheduler(other):
    assert of_training(task(), Training(above, torch.optim.SGD)).content != of_training(task(), other).content


def test_a_training_knows_all_its_data():
    data = Scaled()
    data.train = relabelled().evaluation
    training = Training(above, torch.optim.SGD)
    assert of_training(task(), training).content != of_training(task(data=data), training).content
    assert of_task(task()) == of_task(task(data=data))  # what is only trained on changes no calibrated metric


Pair = namedtuple("Pair", "first second")


@pytest.mark.parametrize(
    ("one", "other"),
    [({1, 2}, {1, 3}), (Pair(1, 2), Pair(2, 1)), (range(3), range(4)), ({"a": 1}, {"b": 1}), (1, True), (0.0, -0.0),
     (torch.zeros(2), torch.zeros(2, 1)), (torch.zeros(1), torch.zeros(1, dtype=torch.int32)), (Path("a"), Path("b")),
     (torch.float16, torch.float32), (lambda x: x + 1, lambda x: x + 2), (functools.lru_cache(above), below)],
)  # fmt: skip
def test_values_are_told_apart(one, other):
    def of(value):
        content = ContentDigest()
        content.add(value, "value")
        assert not content.unidentified
        return content.digest

    assert of(one) == of(one)
    assert of(one) != of(other)


def test_a_ring_and_a_chain_end():
    ring, chain = [], None
    ring.append(ring)
    for _ in range(1000):
        chain = [chain]
    content = ContentDigest()
    content.add(ring, "ring")
    assert not content.unidentified
    content.add(chain, "chain")
    assert content.unidentified == ["chain (nested 100 deep)"]


SCRIPT = """
import user_metric, torch, logging
from torch import nn
from torch.utils.data import TensorDataset
from qflow.tasks.identity import of_task
from qflow.tasks.task import make_task
torch.manual_seed(0)
data = TensorDataset(torch.rand(8, 4), torch.arange(8))
data = type("Data", (), {"calibration": data, "evaluation": data, "names": {"a", "b", "c"}})
print(of_task(make_task(name="t", model=nn.Linear(4, 4), data=data, metric=user_metric.Metric())))
"""


def test_processes_agree_and_see_a_helper_that_changes(tmp_path):
    def run():
        command = [sys.executable, "-c", SCRIPT]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
        return done.stdout

    (tmp_path / "user_metric.py").write_text(
        "from user_helper import half\n\n\nclass Metric:\n    direction = 'maximize'\n\n"
        "    def __call__(self, outputs, batch):\n        return half(outputs)\n"
    )
    helper = tmp_path / "user_helper.py"
    helper.write_text("def half(x):\n    return x.mean(1) / 2\n")
    first = run()
    assert "unidentified=()" in first
    assert run() == first
    helper.write_text("def half(x):\n    return x.mean(1) / 4\n")
    assert run() != first


def test_the_built_in_tasks_are_identified(digits_task):
    assert of_task(digits_task).unidentified == ()
    assert of_task(digits_task) == of_task(replace(digits_task, name="other"))
    from qflow.tasks import dual, exposure
    from qflow.tasks.digits import Accuracy
    from qflow.tasks.perception import data, metric, model
    from qflow.tasks.task import make_task

    small = data.build_data(calibration_size=8, evaluation_size=8)
    others = [(t.build_model(epochs=0), exposure.build_data(calibration_size=8), Accuracy()) for t in (dual, exposure)]
    for net, splits, score in [*others, (model.build_model(), small, metric.Found())]:
        assert of_task(make_task(name="t", model=net, data=splits, metric=score)).unidentified == ()
