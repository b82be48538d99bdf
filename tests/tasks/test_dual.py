"""The dual task: no mix of int8, int16 and fp16 meets the goal; a short QAT does, at a suitable rate."""

import copy

import pytest
import torch
from support.small_tasks import GOAL, MISSED, drop, evaluator_of

from qflow.config.keys import conf_dir
from qflow.core.dtype import QDtype
from qflow.core.errors import ConfigError
from qflow.core.settings import QatSettings, QConfigSettings
from qflow.quant.train.report import DivergedError
from qflow.tasks import digits
from qflow.tasks.dual import build_model, spread
from qflow.trial.training import Training

pytestmark = pytest.mark.slow  # trains

MIX = 0.6  # the input and one more operator stay int8


@pytest.fixture(scope="module")
def evaluator():
    made = evaluator_of("dual", build_model(), digits.build_data(calibration_size=512))
    made.training = Training(digits.loss, torch.optim.AdamW)
    made.rank()
    return made


@pytest.fixture(scope="module")
def shipped():
    """Settings of conf/qat/dual.yaml."""
    from omegaconf import OmegaConf

    node = OmegaConf.to_container(OmegaConf.load(conf_dir() / "qat" / "dual.yaml"))
    return {k: v for k, v in node.items() if k not in ("scheduler", "loss")}


def test_spreading_channels_keeps_the_function_bit_for_bit() -> None:
    plain = digits.DigitsNet().eval()
    wide = copy.deepcopy(plain)
    spread(wide)
    assert not torch.equal(plain.conv3.weight, wide.conv3.weight)
    images, _ = digits.build_data().evaluation.tensors
    with torch.no_grad():
        assert torch.equal(plain(images), wide(images))


def test_int8_and_int16_miss_and_fp16_does_not_help(evaluator) -> None:
    assert evaluator.float_metric > 0.97
    assert drop(evaluator) > 0.3
    assert drop(evaluator, template="qint16") > MISSED + 0.005
    vector = {n.name: "float16" for n in evaluator.graph.quantized if n.kind in evaluator.rules.float16_kinds}
    assert vector
    assert drop(evaluator, template="qint16", modules=vector) > MISSED + 0.005


@pytest.mark.parametrize("sensitive", ["activation", "weight", "both"])
def test_no_mix_is_enough(evaluator, sensitive) -> None:
    assert len(evaluator.precisions.promotable) == 5
    ratios = (0.2, 0.4, 0.6, 0.8, 1.0)
    assert min(drop(evaluator, int16_ratio=ratio, sensitive_type=sensitive) for ratio in ratios) > MISSED


def test_the_rows_of_a_weight_and_its_input_together_would_be_int16_by_int16(evaluator) -> None:
    with pytest.raises(ConfigError, match="no int16 x int16"):
        drop(evaluator, int16_ratio=1.0, sensitive_type="both", counting="rows")


def test_a_fifth_of_the_float_steps_brings_it_back(evaluator, shipped) -> None:
    per_epoch = -(-len(digits.build_data().train) // digits.TRAIN_BATCH)
    assert shipped["float_steps"] == build_model.__kwdefaults__["epochs"] * per_epoch
    assert shipped["steps"] <= 0.2 * shipped["float_steps"]
    settings = QatSettings(**shipped)
    assert drop(evaluator, settings, int16_ratio=MIX) < GOAL - 0.004
    _, applied = evaluator.resolve(QConfigSettings(int16_ratio=MIX))
    assert sum(applied.ops[name].output == QDtype.qint8 for name in evaluator.precisions.promotable) >= 2


def test_a_rate_that_is_too_low_misses_and_one_that_is_too_high_diverges(evaluator, shipped) -> None:
    low, high = (QatSettings(**{**shipped, "learning_rate": rate}) for rate in (1e-7, 1e-3))
    assert drop(evaluator, low, int16_ratio=MIX) > MISSED
    with pytest.raises(DivergedError, match="leaves its calibrated range"):
        drop(evaluator, high, int16_ratio=MIX)
