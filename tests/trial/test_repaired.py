"""Trials share one repair: its weights come and go with a trial's settings, and the user's model stays as it is."""

import copy

import pytest
import torch
from support.models import revive
from support.rescaled import rescaled, resnet20
from torch import nn
from torch.utils.data import TensorDataset

from qflow.config.device_file import load_cost, load_rules
from qflow.core.dtype import QDtype
from qflow.core.repair_settings import RepairSettings
from qflow.core.settings import CalibrationSettings, QatSettings, QConfigSettings, TrialSettings
from qflow.quant.model.weighted import WeightedLeaf
from qflow.tasks.digits import Accuracy
from qflow.tasks.task import make_task
from qflow.trial.cache import Cache
from qflow.trial.evaluator import Evaluator
from qflow.trial.training import Training

NONE, EQUALIZED = RepairSettings(), RepairSettings(equalize=True, samples=48)


class Off:
    """The relative error of a sample."""

    direction = "minimize"

    def __call__(self, outputs, batch):
        return (outputs - batch[1]).norm(dim=1) / batch[1].norm(dim=1)


def images(count, seed, model):
    x = torch.randn(count, 1, 16, 16, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return TensorDataset(x, model(x))


class Images:
    def __init__(self, model):
        self.calibration, self.evaluation, self.train = (images(n, i, model) for i, n in enumerate((64, 96, 64)))


def evaluator_of(model, cache=None, repair=NONE):
    task = make_task(name="rescaled", model=model, data=Images(model), metric=Off())
    made = Evaluator(
        task, load_rules("nash-m"), load_cost("nash-m"), eval_batch=48, cache=cache or Cache(), default_repair=repair
    )
    made.measure_float()
    return made


@pytest.fixture(scope="module")
def model():
    return rescaled(resnet20(), decades=2.0)


def trial(evaluator, repair=NONE, **changes):
    return evaluator.run_trial(TrialSettings(repair=repair, **changes))


def test_dual_int16_is_mended_at_all_int8_and_the_next_trial_has_the_users_weights_again(model):
    before = copy.deepcopy(model.state_dict())
    evaluator = evaluator_of(model)
    plain = trial(evaluator)
    mended = trial(evaluator, EQUALIZED)
    int16 = trial(evaluator, qconfig=QConfigSettings(int16_ratio=1.0))
    assert mended.drop < 0.25 * min(int16.drop, plain.drop)
    again = trial(evaluator)
    assert (again.metric, again.scales, again.weights) == (plain.metric, plain.scales, None)
    assert not again.evaluated, "it is the same trial"
    assert mended.repair.kept and plain.repair is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_the_stored_weights_give_the_same_function_and_the_trial_quantizes_them(model):
    evaluator = evaluator_of(model)
    weights = trial(evaluator, EQUALIZED).weights
    other = copy.deepcopy(model)
    other.load_state_dict(weights)
    x = torch.randn(4, 1, 16, 16)
    with torch.no_grad():
        assert torch.equal(other(x), model(x)), "factors are powers of two"
    changed = [name for name, tensor in weights.items() if not torch.equal(tensor, model.state_dict()[name])]
    assert {"blocks.1.bn1.weight", "blocks.1.conv2.weight"} <= set(changed)


def test_a_repair_is_read_from_the_cache_bit_by_bit(model, tmp_path):
    first, second = (evaluator_of(model, Cache(folder=tmp_path)) for _ in range(2))
    one, two = trial(first, EQUALIZED), trial(second, EQUALIZED)
    assert first.cache.misses["repair"] == 1 and second.cache.misses["repair"] == 0
    assert one.repair == two.repair and one.scales == two.scales
    assert all(torch.equal(one.weights[name], tensor) for name, tensor in two.weights.items())


def test_a_repair_does_not_depend_on_the_trials_qconfig_and_method(model):
    evaluator = evaluator_of(model)
    one = trial(evaluator, EQUALIZED)
    settings = CalibrationSettings(method="minmax", batch_size=8, steps=2)
    two = trial(evaluator, EQUALIZED, qconfig=QConfigSettings(int16_ratio=1.0), calibration=settings)
    assert one.repair is two.repair and evaluator.cache.misses["repair"] == 1


def test_the_analysis_of_a_repaired_study_is_that_of_the_repaired_model(model):
    evaluator = evaluator_of(model, repair=EQUALIZED)
    unrepaired = max(row.score for row in evaluator_of(model).rank().rows)
    assert evaluator.repair().table.kept
    assert evaluator.weights.model is not model
    assert max(row.score for row in evaluator.rank().rows) < 0.5 * unrepaired
    plain = trial(evaluator)
    assert plain.repair is None and evaluator.weights.now is not None, "outside a trial the repair holds again"


def test_training_starts_from_the_repaired_weights(model):
    evaluator = evaluator_of(model)
    evaluator.training = Training(lambda outputs, batch: nn.functional.mse_loss(outputs, batch[1]), torch.optim.SGD)
    still = QatSettings(steps=1, learning_rate=0.0, batch_size=16, mode="with_bn", freeze=("bn",))
    weights, mended = trial(evaluator, EQUALIZED, qat=still).weights, trial(evaluator, EQUALIZED).weights
    parameters = dict(model.named_parameters())
    assert all(torch.equal(weights[name], mended[name]) for name in parameters)
    assert not all(torch.equal(weights[name], tensor) for name, tensor in parameters.items())


@pytest.mark.parametrize("divisor", ["guide", "plugin"])
def test_rounded_weights_lie_on_the_grid_of_the_trials_divisor(divisor):
    evaluator = evaluator_of(resnet20())
    calibration, rounding = CalibrationSettings(divisor=divisor), RepairSettings(rounding=True, samples=48)
    with evaluator.repaired(rounding, calibration):
        evaluator.default_calibration = calibration
        evaluator.all(QDtype.qint8)
        kept = [name for row in evaluator.weights.now.table.kept for name in row.changed]
        leaves = {m.qflow_path: m for m in evaluator.prepared.model.modules() if isinstance(m, WeightedLeaf)}
        for name in kept:
            weight, quantizer = leaves[name].folded()[0].detach(), evaluator.prepared.weights[name]
            codes = weight.flatten(1) / quantizer.scale.reshape(-1, 1)
            off = (codes - codes.round()).abs()
            off[codes.abs() == codes.abs().amax(1, keepdim=True)] = 0.0  # keeps its float value: the scale is its own
            moved = off.amax(1) < 1e-3  # a row whose nearest codes are best stays as it is
            assert float(moved.float().mean()) > 0.5
    assert kept


class Loop(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        return self.layer(x)


def test_what_no_repair_takes_is_said_and_left_alone():
    model = revive(Loop()).eval()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    few = TensorDataset(x, torch.zeros(3, dtype=torch.long))
    data = type("Few", (), {"calibration": few, "evaluation": few})()
    task = make_task(name="few", model=model, data=data, metric=Accuracy())
    evaluator = Evaluator(task, load_rules("nash-m"), load_cost("nash-m"))
    evaluator.measure_float()
    result = trial(evaluator, RepairSettings(equalize=True, bias=True))
    assert [(row.step, row.verdict) for row in result.repair.rows] == [("equalize", "refused"), ("bias", "refused")]
    assert "needs 4 calibration samples or more, but got 3" in result.repair.rows[0].reason
    assert result.weights is None
