"""The model check on planted faults: each is found, named, and nothing else is."""

import math

import torch
from support.models import Shared, revive
from torch import nn

import qflow
from qflow.analysis.checks.model_check import check_text


def findings(model, example, **setters):
    prepared = qflow.prepare(model.eval(), example, **setters)
    qflow.calibrate(prepared, [example])
    return {(f.op, f.level): f.message for f in qflow.check(prepared).findings}


def test_calls_of_a_shared_module_are_alike_or_not():
    class Unlike(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.conv(x) + self.conv(x * self.factor)

    torch.manual_seed(0)
    model, example = Unlike(), torch.randn(2, 3, 8, 8)
    model.factor = 50.0
    assert "case C: conv(1) reaches" in findings(model, example)["conv", "check"]
    model.factor = 1.1
    assert "case B" in findings(model, example)["conv", "info"]


def test_calls_that_were_compared_are_not_told_to_be_compared():
    model = revive(Shared())
    prepared = qflow.prepare(model, torch.randn(2, 4, 8, 8))
    ask = "compare its calls"
    assert any(ask in f.message for f in qflow.check(prepared).findings)
    qflow.calibrate(prepared, [torch.randn(2, 4, 8, 8)])
    assert not any(ask in f.message for f in qflow.check(prepared).findings)


def test_a_wide_range_in_int8_asks_for_int16():
    class Loud(nn.Module):
        def forward(self, x):
            return x * 40.0

    torch.manual_seed(0)
    found = findings(Loud(), torch.randn(2, 3, 8, 8))
    assert "above 10 int8 is not advised" in found["[mul]", "check"]
    assert ("quant[x]", "check") not in found


def test_an_infinite_mask_is_named():
    class Masked(nn.Module):
        def forward(self, x):
            return x.masked_fill(x < 0, -math.inf).amax(-1)

    torch.manual_seed(0)
    assert "infinite values" in findings(Masked(), torch.randn(2, 3, 8))["[masked_fill]", "check"]


def test_channels_without_weights_and_an_accumulator_that_overflows():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Flatten(), nn.Linear(140000, 2))
    with torch.no_grad():
        model[0].weight[1] = 0.0
        model[2].weight.fill_(1.0)
    found = findings(model, torch.randn(2, 3, 175, 200))
    assert found["0", "info"].startswith("1 of 4 output channels")
    assert found["2", "error"] == "2 channels can overflow the int32 accumulator"


def test_a_fixed_scale_that_is_too_small_is_named():
    torch.manual_seed(0)
    setter = qflow.ModuleNameQconfigSetter({"quant[input]": qflow.OpQConfig(qflow.QDtype.qint8, fixed_scale=0.001)})
    found = findings(nn.Sequential(nn.Conv2d(3, 4, 1)), torch.randn(2, 3, 8, 8), qconfig_setter=setter)
    assert "fixed scale covers 0.128" in found["quant[input]", "check"]


def test_the_file_has_the_guides_sections_in_order():
    prepared = qflow.prepare(revive(Shared()), torch.randn(2, 4, 8, 8))
    text = check_text(qflow.check(prepared))
    sections = [
        "Fusable modules are listed below:",
        "Each module called times:",
        "Dtype statistics:",
        "Each layer out qconfig:",
        "Weight qconfig:",
        "Please check if these OPs qconfigs are expected..",
    ]
    assert [text.index(s) for s in sections] == sorted(text.index(s) for s in sections)
    assert "never" in text


class Frozen(nn.BatchNorm2d):
    """A batch norm that the plugin does not recognise by its type."""

    def forward(self, x):
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False)


def test_pairs_that_do_not_fuse_for_one_reason_are_one_finding():
    layers = [layer for _ in range(6) for layer in (nn.Conv2d(3, 3, 1), Frozen(3))]
    found = findings(nn.Sequential(*layers, nn.ReLU()).eval(), torch.randn(2, 3, 4, 4))
    ((op, said),) = [(op, text) for (op, _), text in found.items() if "could fuse with" in text]
    assert op == "0" and "with 1 but does not" in said
    assert said.endswith("(5 more: 2, 4, 6, 8, ...)")
