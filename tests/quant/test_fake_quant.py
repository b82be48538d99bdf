import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qflow.core.dtype import QDtype
from qflow.core.errors import ModelError
from qflow.quant.fake_quant import FakeQuant, quantize_dequantize


@pytest.mark.parametrize(("dtype", "qmin", "qmax"), [("qint8", -128, 127), ("qint16", -32768, 32767)])
def test_it_is_torchs_own_fake_quant_bit_for_bit(dtype, qmin, qmax):
    torch.manual_seed(0)
    x = torch.randn(4096) * 3
    scale = 3.1 / -qmin
    expected = torch.fake_quantize_per_tensor_affine(x, scale, 0, qmin, qmax)
    assert torch.equal(quantize_dequantize(x, torch.tensor(scale), qmin, qmax), expected)
    assert QDtype(dtype).qmin == qmin


def test_weights_per_channel_equal_torchs_own():
    torch.manual_seed(0)
    w = torch.randn(8, 4, 3, 3)
    scale = w.abs().amax(dim=(1, 2, 3)) / 128
    expected = torch.fake_quantize_per_channel_affine(w, scale, torch.zeros(8, dtype=torch.int32), 0, -128, 127)
    assert torch.equal(quantize_dequantize(w, scale.view(8, 1, 1, 1), -128, 127), expected)


def test_halves_round_to_even_and_ends_saturate():
    x = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 200.0, -200.0])
    assert quantize_dequantize(x, 1.0, -128, 127).tolist() == [0, 2, 2, 0, -2, 127, -128]


def test_nan_stays_nan():
    assert quantize_dequantize(torch.tensor([float("nan")]), 1.0, -128, 127).isnan().all()


@given(st.floats(1e-4, 10.0), st.lists(st.floats(-50, 50, width=32), min_size=1, max_size=20))
def test_values_land_on_the_grid_within_half_a_step(scale, values):
    x = torch.tensor(values)
    y = quantize_dequantize(x, scale, -128, 127)
    codes = (y.double() / scale).round()
    assert ((codes >= -128) & (codes <= 127)).all()
    inside = (x.double() >= -128 * scale) & (x.double() <= 127 * scale)
    assert ((x.double() - y.double()).abs()[inside] <= 0.5 * scale * (1 + 1e-4)).all()


def test_the_gradient_is_torchs_straight_through():
    torch.manual_seed(0)
    x = (torch.randn(500) * 100).requires_grad_()
    reference = x.detach().clone().requires_grad_()
    quantizer = FakeQuant("x")
    quantizer.set_scale(1.0)
    quantizer.enabled = True
    quantizer(x).square().sum().backward()
    torch.fake_quantize_per_tensor_affine(reference, 1.0, 0, -128, 127).square().sum().backward()
    assert torch.equal(x.grad, reference.grad)
    assert (x.grad == 0).any()


def test_fp16_rounds_and_lets_small_gradients_pass():
    quantizer = FakeQuant("x")
    quantizer.dtype, quantizer.enabled = QDtype.float16, True
    x = torch.tensor([1.0 + 2**-12, 3.0], requires_grad=True)
    y = quantizer(x)
    assert torch.equal(y, x.detach().half().float())
    (y * 1e-9).sum().backward()
    assert torch.allclose(x.grad, torch.full((2,), 1e-9))


def test_off_is_the_same_object_and_uncalibrated_is_refused():
    quantizer = FakeQuant("head")
    x = torch.rand(3)
    assert quantizer(x) is x
    quantizer.enabled = True
    with pytest.raises(ModelError, match="head was never calibrated"):
        quantizer(x)
    with pytest.raises(ModelError, match="A scale is finite"):
        quantizer.set_scale(float("inf"))
