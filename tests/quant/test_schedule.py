"""The guide's QAT has no warm-up: what a scheduler will do is known before the training begins."""

import functools

import pytest
import torch
from torch.optim import lr_scheduler as schedules

from qflow.core.errors import ConfigError
from qflow.quant.train.schedule import check_schedule, foreseen_rates

GROUPS = [{"params": [], "lr": 0.1, "name": "head"}, {"params": [], "lr": 0.001, "name": ""}]


def check(scheduler, steps=20, optimizer=torch.optim.AdamW):
    return check_schedule(GROUPS, optimizer, scheduler, 0.001, steps)


class Own:
    """A warm-up that is no scheduler of torch's."""

    def __init__(self, optimizer):
        self.optimizer, self.count = optimizer, 0
        self.tops = [group["lr"] for group in optimizer.param_groups]
        self.step()

    def step(self):
        self.count += 1
        for group, top in zip(self.optimizer.param_groups, self.tops, strict=True):
            group["lr"] = top * min(self.count / 5, 1.0)


class Late(Own):
    """The same, but the first step is done at the full rate."""

    def __init__(self, optimizer):
        super().__init__(optimizer)
        for group, top in zip(optimizer.param_groups, self.tops, strict=True):
            group["lr"] = top


RISING = {
    "one cycle": functools.partial(schedules.OneCycleLR, max_lr=0.1, total_steps=20),
    "linear": schedules.LinearLR,
    "constant": schedules.ConstantLR,
    "lambda": functools.partial(schedules.LambdaLR, lr_lambda=lambda step: min(1.0, (step + 1) / 5)),
    "sequence": lambda optimizer: schedules.SequentialLR(
        optimizer, [schedules.LinearLR(optimizer, 0.2, total_iters=5), schedules.CosineAnnealingLR(optimizer, 15)], [5]
    ),
    "one's own": lambda optimizer: Own(optimizer),
    "cyclic": functools.partial(schedules.CyclicLR, base_lr=0.01, max_lr=0.1, cycle_momentum=False),
    "one group": functools.partial(schedules.LambdaLR, lr_lambda=[lambda step: 1.0, lambda step: 1.0 + (step > 7)]),
}


@pytest.mark.parametrize("name", RISING)
def test_a_rate_that_rises_above_its_first_value_is_refused(name):
    with pytest.raises(ConfigError, match=r"no warm-up, but got a rate that rises from .* at step 1 to .* at step \d+"):
        check(RISING[name])


DECAYING = {
    "none": None,
    "cosine": functools.partial(schedules.CosineAnnealingLR, T_max=20),
    "steps": functools.partial(schedules.MultiStepLR, milestones=[5, 10]),
    "exponential": functools.partial(schedules.ExponentialLR, gamma=0.9),
    "polynomial": functools.partial(schedules.PolynomialLR, total_iters=20),
}


@pytest.mark.parametrize("name", DECAYING)
def test_a_rate_that_decays_is_taken(name):
    assert check(DECAYING[name]) == ()


def test_a_warm_up_after_a_first_step_at_the_full_rate_is_reported():
    (finding,) = check(Late)
    assert finding.startswith("the rate rises again at step 3, from 0.04 to 0.06")


def test_a_restart_is_reported():
    (finding,) = check(functools.partial(schedules.CosineAnnealingWarmRestarts, T_0=5))
    assert finding.startswith("the rate rises again at step 6, from ")


def test_the_rates_are_those_of_the_training():
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in GROUPS]
    groups = [{**group, "params": [parameter]} for group, parameter in zip(GROUPS, parameters, strict=True)]
    optimizer = torch.optim.SGD(groups, lr=0.001)
    scheduler = schedules.ExponentialLR(optimizer, 0.5)
    found = foreseen_rates(GROUPS, torch.optim.SGD, functools.partial(schedules.ExponentialLR, gamma=0.5), 0.001, 4)
    for rates in found:
        assert rates == tuple(group["lr"] for group in optimizer.param_groups)
        optimizer.step()
        scheduler.step()
    assert torch.equal(parameters[0], torch.ones(2))


WRONG = {
    "needs a metric": (
        {"scheduler": schedules.ReduceLROnPlateau},
        "qat.scheduler is called with .*metrics",
    ),
    "lacks an argument": ({"scheduler": schedules.CosineAnnealingLR}, "qat.scheduler is called with .*T_max"),
    "is over too early": (
        {"scheduler": functools.partial(schedules.OneCycleLR, max_lr=1e-9, total_steps=3, div_factor=1.0)},
        "qat.scheduler",
    ),
    "an optimizer's argument": (
        {"scheduler": None, "optimizer": functools.partial(torch.optim.SGD, moment=0.9)},
        r"qat.optimizer is called with \(groups, lr=...\) .*moment",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_stepped_is_refused_in_one_line(case):
    arguments, says = WRONG[case]
    with pytest.raises(ConfigError, match=says) as caught:
        check(**arguments)
    assert "\n" not in str(caught.value)
