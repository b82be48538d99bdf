"""Agreement with the float model: a metric for every task, without labels, and never called accuracy."""

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from qflow.core.agreement import meaning
from qflow.core.errors import ConfigError
from qflow.study.gate import score
from qflow.tasks.metrics.agreement import Agreement
from qflow.tasks.metrics.labels import Top1
from qflow.tasks.task import evaluate, make_task
from qflow.trial.frames import evaluate_from_start


class Inputs(Dataset):
    """Random inputs without labels."""

    def __init__(self, *shape, sequences=None):
        self.values, self.sequences = torch.randn(*shape, generator=torch.Generator().manual_seed(0)), sequences

    def __len__(self):
        return len(self.values)

    def __getitem__(self, index):
        return self.values[index]


class Data:
    unlabelled = "they are random"

    def __init__(self, *shape, sequences=None):
        self.calibration = self.evaluation = self.held_out = Inputs(*shape, sequences=sequences)

    def own_metric(self):
        return Agreement()


def task_of(model, *shape, metric=None, **stated):
    sequences = stated.pop("sequences", None)
    return make_task(name="t", model=model, data=Data(*shape, sequences=sequences), metric=metric, **stated)


def coarse(model):
    """The same model with rounded weights, in the place of a quantized one."""
    other = nn.Linear(model.in_features, model.out_features).eval()
    other.load_state_dict({k: (v * 4).round() / 4 for k, v in model.state_dict().items()})
    return other


def test_it_counts_the_samples_whose_first_class_is_that_of_the_float_model():
    torch.manual_seed(0)
    model = nn.Linear(8, 5)
    task, other = task_of(model, 40, 8), coarse(model)
    x = task.data.evaluation.values
    expected = (other(x).argmax(1) == model(x).argmax(1)).float().mean()
    assert 0 < expected < 1
    found = [evaluate(task, other, batch_size)[0] for batch_size in (1, 7, 40)]  # float runs on the same batches
    assert found == pytest.approx([float(expected)] * 3)
    assert evaluate(task, model, 7) == (1.0, 40)
    assert task.metric_name == "agreement_top1"


@pytest.mark.parametrize("by", ["top1", "pixels", "cosine"])
def test_equal_outputs_agree_by_exactly_1_and_others_by_less(by):
    generator = torch.Generator().manual_seed(0)
    shape = (4, 3) if by == "top1" else (4, 3, 5, 5)
    one, other = (torch.randn(shape, generator=generator) for _ in range(2))
    assert Agreement(by=by)(one, None, one).tolist() == [1.0] * 4
    scores = Agreement(by=by)(other, None, one)
    assert scores.shape == (4,) and float(scores.mean()) < 1
    assert Agreement(by="cosine")(0 * one, None, 0 * one).tolist() == [1.0] * 4  # equal, although it has no direction


def test_outputs_are_named_as_the_plugin_names_them():
    x, y = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    ours, reference = {"box": x, "heads": [x, x]}, {"box": x, "heads": [x, y]}
    assert float(Agreement(by="top1")(ours, None, reference)) == pytest.approx(2 / 3)
    assert float(Agreement(by="top1", outputs=["heads-1"])(ours, None, reference)) == 0
    with pytest.raises(ConfigError, match=r"box, heads-0, heads-1, but got \['heads'\]"):
        Agreement(outputs=["heads"])(ours, None, reference)


def test_what_cannot_be_compared_so_names_what_can():
    with pytest.raises(ConfigError, match="metric.by=cosine, metric.by=pixels|metric.by=pixels, metric.by=cosine"):
        Agreement(by="top1")(torch.rand(2, 3, 4, 4), None, torch.rand(2, 3, 4, 4))
    with pytest.raises(ConfigError, match="metric.by is one of top1, pixels, cosine, but got top5"):
        Agreement(by="top5")


class Counter(nn.Module):
    """Adds what it has seen in the sequence so far."""

    def __init__(self):
        super().__init__()
        self.seen = None

    def forward(self, x):
        self.seen = x if self.seen is None else self.seen + x
        return self.seen * 1.0


def test_the_float_model_follows_the_sequences_beside_the_other():
    task = task_of(Counter(), 6, 4, sequences=[3, 3], cached_attrs=("seen",))
    for batch_size in (1, 2):
        found = evaluate_from_start(task, Counter(), batch_size, lambda _: None)
        assert found.scores == (1.0,) * 6  # a state that is left over would differ from the second sequence on
        assert task.model.seen is None


def test_promote_scores_held_out_samples_with_it_too():
    torch.manual_seed(0)
    model = nn.Linear(8, 5)
    task = task_of(model, 40, 8)
    assert score(task, model, "held_out", 8).metric == 1.0
    found = score(task, coarse(model), "held_out", 8)
    assert found.metric == sum(found.scores) / 40 < 1


def test_without_labels_a_metric_of_labels_is_refused():
    with pytest.raises(ConfigError, match="Top1 compares with labels, but got none: they are random. Use metric=agree"):
        task_of(nn.Linear(8, 5), 4, 8, metric=Top1())


def test_it_is_said_what_it_is():
    assert "not accuracy" in meaning("agreement_top1") and "1 by definition" in meaning("agreement_cosine")
    assert meaning("top1") == ""
