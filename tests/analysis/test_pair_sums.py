"""The sums behind the layer table: as exact in float32 as in float64, and made once for values that are passed on."""

import pytest
import torch
from support.replays import calibrated
from torch import nn

from qflow.analysis.layers.compare import compare_layers
from qflow.analysis.measures import layer_metrics
from qflow.analysis.measures.kl_divergence import divergence
from qflow.analysis.measures.layer_metrics import _in_double, compare


@pytest.mark.parametrize("shape", [(3, 5, 7), (70_000,), (2, 3, 200, 120)])
def test_sums_in_float32_are_those_in_float64(shape):
    generator = torch.Generator().manual_seed(0)
    for offset, noise in ((0.0, 0.1), (50.0, 1e-4), (0.0, 1e-6)):
        x = torch.randn(shape, generator=generator) + offset
        y = x + noise * torch.randn(shape, generator=generator)
        if x.ndim == 4:
            x, y = (t.contiguous(memory_format=torch.channels_last) for t in (x, y))
        found, wanted = compare(x, y), _in_double(x, y)
        for column, value in wanted.items():
            assert found[column] == pytest.approx(value, rel=1e-5, abs=1e-12), (column, offset)


def test_values_that_an_operator_passes_on_are_compared_once(monkeypatch):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Identity(), nn.Dropout(), nn.Unflatten(1, (2, 3)), nn.Flatten()).eval()
    x = torch.randn(4, 6)
    prepared = calibrated(model, x)
    compared = []
    own = layer_metrics.pair_sums
    monkeypatch.setattr(layer_metrics, "pair_sums", lambda a, b: compared.append(a.shape) or own(a, b))
    table = compare_layers(model, prepared, x)
    assert compared == [x.shape, x.shape]  # the input, the linear layer
    linear = table.rows[1]
    assert [row.shape for row in table.rows[2:]] == [(4, 6), (4, 6), (4, 2, 3), (4, 6)]
    for row in table.rows[2:]:
        assert (row.SQNR, row.error, row.single_error) == (linear.SQNR, linear.error, linear.single_error)
    assert table.rows[4].KL != linear.KL  # along another axis


@pytest.mark.parametrize(("size", "noise"), [(1.0, 1e-4), (5.0, 0.2), (20.0, 1e-2), (1.0, 2.0)])
def test_kl_has_five_digits_also_where_the_calibrated_values_are_shifted(size, noise):
    generator = torch.Generator().manual_seed(0)
    for shift in (0.0, -0.3, 0.05):
        x = size * torch.randn(3, 90, 64, generator=generator)
        y = x + noise * (torch.rand(x.shape, generator=generator) - 0.5) + shift
        p, c = x.double().softmax(1), y.double().log_softmax(1) - x.double().log_softmax(1)
        wanted = float((p * (c.expm1() - c)).mean())
        known = divergence(x, y, float(x.abs().max()), float((y - x).abs().max()))
        assert known == pytest.approx(wanted, rel=1e-5)
