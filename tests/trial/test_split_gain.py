"""What splitting the calls of a shared activation gives is measured on the bad cases, and only where it can help."""

import re

import pytest
import torch
from support.models import revive
from support.small_tasks import evaluator_of
from support.yolo import Classifier, own_activations

from qflow.core.dtype import QDtype
from qflow.tasks import digits
from qflow.trial.diagnosis import Diagnosis
from qflow.trial.outputs import outputs_off


def evaluator(model, **options):
    found = evaluator_of("detector", model, digits.build_data())
    found.default_calibration = type(found.default_calibration)(batch_size=16, steps=2)
    for name, value in options.items():
        setattr(found, name, value)
    return found


@pytest.fixture(scope="module")
def model():
    """The first block is forty times as loud as the others; the next one takes it back."""
    torch.manual_seed(0)
    found = revive(Scores(Classifier()))
    loud, quiet = found.inner.detector.stem.bn, found.inner.detector.stage1.cv1.conv
    with torch.no_grad():
        loud.weight *= 40.0
        loud.bias *= 40.0
        quiet.weight /= 40.0
    return found


class Scores(torch.nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, image):
        return self.inner(image)["scores"]


def test_the_gain_is_that_of_the_setting_it_names(model):
    shared = evaluator(model)
    diagnosis = Diagnosis(shared)
    diagnosis.compare_layers()
    (found,) = diagnosis.split_gain
    assert (found.op, found.level) == ("inner.detector.stem.act", "check")
    assert found.message.endswith("quant.split_shared=auto")
    before, after = map(float, re.search(r"from (\S+) to (\S+) \(L1\)", found.message).groups())
    assert after < before / 2
    assert found in diagnosis.all_findings

    apart = evaluator(model, split_shared=("auto",))
    apart.badcases = shared.badcases
    apart.apply(apart.template(QDtype.qint8)[1])
    assert float(f"{outputs_off(apart):.4g}") == after
    assert apart.identity.content["split_shared"] == ["auto"]
    assert apart.identity != shared.identity


@pytest.mark.parametrize("options", [{"split_shared": ("auto",)}, {}])
def test_nothing_is_measured_where_no_module_is_shared(model, options):
    diagnosis = Diagnosis(evaluator(model if options else own_activations(model), **options))
    diagnosis.compare_layers()
    assert diagnosis.split_gain == ()
