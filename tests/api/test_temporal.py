"""The library on models that keep state between calls: calibration, quantized sequences, cost."""

import pytest
import torch
from support.temporal import KINDS, ConvGru, FromNone, frames, made
from torch.utils.data import DataLoader, TensorDataset

import qflow
from qflow.core.errors import ConfigError, DataError

INT16 = qflow.calibration_8bit_weight_16bit_act_qconfig_setter


def calibrated(kind, setter=(), count=6):
    attrs, _ = KINDS[kind]
    model = made(kind)
    prepared = qflow.prepare(model, frames(kind, 1)[0], setter, cached_attrs=attrs)
    sequences = [frames(kind, count, seed) for seed in range(3)]
    qflow.calibrate(prepared, [frame for sequence in sequences for frame in sequence], sequences=[count] * 3)
    return model, prepared


def outputs(model, sequence):
    with torch.no_grad():
        found = [model(*frame) for frame in sequence]
    return torch.stack([next(iter(y.values())) if isinstance(y, dict) else y for y in found])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_a_quantized_model_carries_its_own_state_and_stays_near_the_model(kind):
    errors = {}
    for setter, name in (((), "int8"), (INT16, "int16")):
        model, prepared = calibrated(kind, setter)
        sequence = frames(kind, 24, seed=9)
        expected, got = outputs(model, sequence), outputs(prepared, sequence)
        off = (got - expected).flatten(1).norm(dim=1) / expected.flatten(1).norm(dim=1)
        assert off[-4:].mean() < 2.0 * off[2:8].mean()  # it does not grow along the sequence
        errors[name] = float(off.mean())
        prepared.reset_state()
        assert torch.equal(outputs(prepared, sequence), got)
    assert 0.0 < errors["int8"] < 0.06
    assert errors["int16"] < errors["int8"]


def test_calibration_sees_the_values_of_the_state_along_the_sequences():
    model, prepared = calibrated(FromNone)
    largest = 0.0
    for seed in range(3):
        model.state = None
        for n, frame in enumerate(frames(FromNone, 6, seed)):
            if n:
                largest = max(largest, float(model.state.abs().max()))
            with torch.no_grad():
                model(*frame)
    histogram = prepared.stats.histograms["quant[self.state]"]
    assert histogram.largest == pytest.approx(largest, rel=1e-6)
    assert prepared.model.state is None  # the next call begins a sequence


def test_frames_out_of_order_are_refused():
    attrs, _ = KINDS[FromNone]
    prepared = qflow.prepare(made(FromNone), frames(FromNone, 1)[0], cached_attrs=attrs)
    items = [frame for frame in frames(FromNone, 4)]
    shuffled = DataLoader(TensorDataset(torch.randn(4, 3, 8, 8)), shuffle=True)
    with pytest.raises(DataError, match="come in order, but got a DataLoader that shuffles. Set shuffle=False"):
        qflow.calibrate(prepared, shuffled)
    with pytest.raises(DataError, match="Sequences hold all items of the data, 6, but got 4"):
        qflow.calibrate(prepared, items, sequences=[3, 3])
    with pytest.raises(DataError, match="Sequences hold all items of the data, 3, but got more"):
        qflow.calibrate(prepared, items, sequences=[3])
    with pytest.raises(DataError, match="A sequence holds a frame or more, but got lengths"):
        qflow.calibrate(prepared, items, sequences=[4, 0])
    plain = qflow.prepare(torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)).eval(), torch.randn(2, 3, 8, 8))
    with pytest.raises(ConfigError, match="sequences are for a model with state, but got one without cached_attrs"):
        qflow.calibrate(plain, [torch.randn(2, 3, 8, 8)], sequences=[1])


def test_the_state_is_priced_as_it_moves_in_and_out():
    _, prepared = calibrated(ConvGru)
    report = qflow.cost(prepared)
    state = 8 * 8 * 8  # int8 bytes of one hidden map
    assert report.traffic.input_bytes == 3 * 8 * 8 + state
    assert report.traffic.output_bytes == 2 * 8 * 8 * 4 + state
    outputs(prepared, frames(ConvGru, 3))
    assert qflow.cost(prepared) == report  # whatever the frame
