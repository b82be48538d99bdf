"""What a user may bring: batches of every form, metrics with a direction; and what is refused."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from qflow.core.errors import ConfigError, DataError, ModelError
from qflow.tasks.deployed import deploy_inputs
from qflow.tasks.task import batches, evaluate, make_task, model_inputs


class Data:
    def __init__(self, samples):
        self.calibration = self.evaluation = samples


class One(nn.Module):
    def forward(self, x):
        return x.mean(1)


class Two(nn.Module):
    def forward(self, left, right, scale=1.0):
        return left + right


def score(outputs, batch):
    return torch.ones(len(batch[0]) if isinstance(batch, (tuple, list)) else len(next(iter(batch.values()))))


score.direction = "maximize"


def task_of(model, samples, metric=score, **stated):
    return make_task(name="t", model=model, data=Data(samples), metric=metric, **stated)


def test_the_model_gets_its_inputs_out_of_any_batch():
    x, y = torch.rand(2, 3), torch.rand(2, 3)
    one, two = task_of(One(), [0]), task_of(Two(), [0])
    assert model_inputs(one, x)[0] is x
    assert model_inputs(one, (x, y)) == (x,)
    assert model_inputs(one, {"x": x, "label": y}) == {"x": x}
    assert model_inputs(two, (x, y, 3)) == (x, y)
    assert model_inputs(two, ((x, y), 3)) == (x, y)
    assert model_inputs(two, {"left": x, "right": y, "label": 1}) == {"left": x, "right": y}
    assert model_inputs(two, ({"left": x, "right": y}, 1)) == {"left": x, "right": y}


def test_a_dict_that_is_no_set_of_arguments_goes_in_whole():
    class Takes(nn.Module):
        def forward(self, batch):
            return batch["image"]

    assert model_inputs(task_of(Takes(), [0]), {"image": 1}) == ({"image": 1},)


def test_the_users_own_rule_wins():
    task = task_of(One(), [0])
    task.data.model_inputs = lambda batch: (batch["deep"]["x"],)
    assert model_inputs(task, {"deep": {"x": 7}}) == (7,)


def test_evaluation_is_the_mean_over_samples_not_batches():
    values = torch.arange(10.0).view(10, 1)

    def value(outputs, batch):
        return outputs

    value.direction = "maximize"
    task = task_of(One(), TensorDataset(values), metric=value)
    assert evaluate(task, task.model, 4) == (4.5, 10)
    assert evaluate(task, task.model, 10) == (4.5, 10)


def test_a_stateful_metric_and_torchmetrics_direction():
    class Error:
        higher_is_better = False

        def reset(self):
            self.seen = []

        def update(self, outputs, batch):
            self.seen.append(outputs)

        def compute(self):
            return torch.cat(self.seen).abs().max()

    task = task_of(One(), TensorDataset(torch.arange(6.0).view(6, 1)), metric=Error())
    assert task.direction == "minimize"
    assert evaluate(task, task.model, 4)[0] == 5.0
    assert evaluate(task, task.model, 4)[0] == 5.0
    assert task.drop(1.0, 1.2) == pytest.approx(0.2)


def test_parts_that_do_not_fit_are_refused_in_a_sentence():
    with pytest.raises(ConfigError, match=r"task.model gives a torch.nn.Module, but got str"):
        make_task(name="t", model="resnet", data=Data([0]), metric=score)
    with pytest.raises(ConfigError, match="has no evaluation that can be indexed"):
        make_task(name="t", model=One(), data=type("D", (), {"calibration": [0]})(), metric=score)
    with pytest.raises(ConfigError, match="declares direction maximize or minimize, but got None"):
        make_task(name="t", model=One(), data=Data([0]), metric=lambda outputs, batch: 0)


def test_data_that_cannot_be_used_are_refused():
    nan = task_of(One(), TensorDataset(torch.tensor([[1.0], [float("nan")]])))
    with pytest.raises(DataError, match=r"NaN or inf in task.data.evaluation"):
        list(batches(nan, "evaluation", 2))
    with pytest.raises(DataError, match="holds samples, but got none"):
        list(batches(task_of(One(), []), "calibration", 2))
    ragged = [torch.rand(2), torch.rand(3)]
    with pytest.raises(DataError, match="must load and batch together, but got RuntimeError"):
        list(batches(task_of(One(), ragged), "calibration", 2))
    with pytest.raises(DataError, match="holds tensors"):
        list(batches(task_of(One(), ["a", "b"]), "calibration", 2))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_metric_that_alone_is_not_finite_is_what_the_line_speaks_of(value):
    def metric(outputs, batch):
        return torch.full((len(outputs),), value)

    metric.direction = "maximize"
    task = task_of(One(), TensorDataset(torch.ones(2, 1)), metric=metric)
    with pytest.raises(ConfigError, match=rf"all outputs are finite, but got {value}\. Look at task\.metric"):
        evaluate(task, task.model, 2)


def test_outputs_that_are_not_finite_and_batches_the_model_cannot_take_are_refused():
    class Bad(nn.Module):
        def forward(self, x):
            return x / 0.0

    task = task_of(Bad(), TensorDataset(torch.ones(2, 1)))
    with pytest.raises(ModelError, match="Outputs of a model are finite"):
        evaluate(task, task.model, 2)
    task = task_of(nn.Linear(3, 1), TensorDataset(torch.ones(2, 5)))
    with pytest.raises(ModelError, match=r"got shapes \[\(2, 5\)\]"):
        evaluate(task, task.model, 2)
    task = task_of(One(), TensorDataset(torch.ones(2, 1)), metric=score)
    task.metric.__dict__.update(direction="maximize")
    wrong = task_of(
        One(),
        TensorDataset(torch.ones(2, 1)),
        metric=type("M", (), {"direction": "maximize", "__call__": lambda self, o, b: torch.tensor(1.0)})(),
    )
    with pytest.raises(ConfigError, match="one score a sample"):
        evaluate(wrong, wrong.model, 2)


def test_the_deployed_shape_replaces_the_evaluated_one():
    example = (torch.rand(4, 3, 8, 8),)
    assert deploy_inputs(task_of(One(), [0], deploy_shape=(1, 3, 16, 32)), example)[0].shape == (1, 3, 16, 32)
    assert deploy_inputs(task_of(One(), [0]), example)[0].shape == (1, 3, 8, 8)
    named = task_of(Two(), [0], deploy_shape={"left": [1, 5]})
    shapes = deploy_inputs(named, {"left": torch.rand(4, 2), "right": torch.rand(4, 2)})
    assert (shapes["left"].shape, shapes["right"].shape) == ((1, 5), (1, 2))
    with pytest.raises(ConfigError, match="as many dimensions"):
        deploy_inputs(task_of(One(), [0], deploy_shape=(3, 16, 32)), example)


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_an_evaluation_ends_once_the_goal_is_out_of_reach_and_never_flatters(direction):
    """Exact by bounds: with the goal in reach, every sample is run and the metric is the same."""
    import torch
    from torch import nn
    from torch.utils.data import TensorDataset

    from qflow.tasks.task import evaluate, make_task

    scores = (torch.arange(64) % 4 == 0).float()[:, None]

    class Data:
        calibration = evaluation = TensorDataset(scores, scores)

    class Score:
        bounds = (0.0, 1.0)

        def __call__(self, outputs, batch):
            return outputs[:, 0] if direction == "maximize" else 1.0 - outputs[:, 0]

    Score.direction = direction
    task = make_task(name="t", model=nn.Identity(), data=Data, metric=Score())
    whole, samples = evaluate(task, task.model, 8)
    assert (whole, samples) == (0.25 if direction == "maximize" else 0.75, 64)
    assert evaluate(task, task.model, 8, least=whole) == (whole, 64)
    least = 0.5
    metric, count = evaluate(task, task.model, 8, least=least)
    assert count < 64
    assert metric <= whole if direction == "maximize" else metric >= whole
    assert metric < least if direction == "maximize" else metric > least


@pytest.mark.parametrize("bounds", [1.0, (0.0, float("inf")), (1.0, 0.0), (0.0,), None, lambda: (0.0, 1.0)])
def test_bounds_are_two_finite_numbers_where_they_are_used(bounds):
    from types import SimpleNamespace

    from qflow.tasks.early_stop import bounds_of, require_within

    with pytest.raises(ConfigError, match="two finite numbers"):
        bounds_of(SimpleNamespace(bounds=bounds))
    assert bounds_of(SimpleNamespace(bounds=(0, 1))) == (0.0, 1.0)
    require_within((0.0, 1.0), torch.tensor([1.0000001]))  # what float32 makes of a sum of ones
    with pytest.raises(ConfigError, match=r"within its bounds \(0.0, 1.0\), but got 0.5 to 1.5"):
        require_within((0.0, 1.0), torch.tensor([0.5, 1.5]))
