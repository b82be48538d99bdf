import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qflow.core.dtype import QDtype
from qflow.core.errors import ModelError
from qflow.quant.values.fake_quant import EPS, FakeQuant
from qflow.quant.values.grid import StraightThrough, quantize_dequantize


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


@pytest.mark.parametrize("kind", [torch.float32, torch.float64])
@pytest.mark.parametrize(("qmin", "qmax"), [(-128, 127), (-32768, 32767)])
def test_gradient_bounds_are_exact_to_the_last_ulp(kind, qmin, qmax):
    """At and around every tie the mask is that of the rounded code, whatever the scale."""
    torch.manual_seed(0)
    for scale in [*(torch.rand(200) * 3 + 1e-6).tolist(), 1.0, 2.0**-7, EPS]:
        scale = torch.tensor(scale).item()
        ends = torch.tensor([(qmin - 0.5) * scale, (qmax + 0.5) * scale], dtype=kind)
        around = [ends]
        for direction in (float("inf"), -float("inf")):
            step = ends
            for _ in range(6):
                step = torch.nextafter(step, torch.tensor(direction, dtype=kind))
                around.append(step)
        x = torch.cat(around).requires_grad_()
        code = (x.detach() * (1.0 / scale)).round()
        StraightThrough.apply(x, scale, qmin, qmax).sum().backward()
        assert torch.equal(x.grad != 0, (code >= qmin) & (code <= qmax))


def test_the_gradient_per_channel_is_torchs_own():
    torch.manual_seed(0)
    w = (torch.randn(6, 4, 3, 3) * 2).requires_grad_()
    twin = w.detach().clone().requires_grad_()
    scale = w.detach().abs().amax(dim=(1, 2, 3)) / 128 * 0.7
    quantizer = on(FakeQuant("w", 6, 0, 4))
    quantizer.set_scale(scale)
    quantizer(w).square().sum().backward()
    zero = torch.zeros(6, dtype=torch.int32)
    torch.fake_quantize_per_channel_affine(twin, scale, zero, 0, -128, 127).square().sum().backward()
    assert torch.equal(w.grad, twin.grad)
    assert (w.grad == 0).any()


def on(quantizer, dtype=QDtype.qint8):
    quantizer.enabled, quantizer.dtype = True, dtype
    return quantizer


@pytest.mark.parametrize(("dtype", "margin", "divisor"), [(QDtype.qint8, 1.0, 128.0), (QDtype.qint16, 1.25, 32768.0)])
def test_a_moving_scale_is_the_plugins_average_of_both_ends(dtype, margin, divisor):
    quantizer = on(FakeQuant("x"), dtype)
    quantizer.averaging_constant, quantizer.margin = 0.1, margin
    quantizer.set_scale(2.0 * margin / divisor)
    low, high = -2.0, 2.0
    for batch in (torch.tensor([-1.0, 3.0]), torch.tensor([-6.0, 1.0]), torch.tensor([0.0, 0.5])):
        quantizer(batch)
        low, high = low + 0.1 * (float(batch.min()) - low), high + 0.1 * (float(batch.max()) - high)
        assert float(quantizer.scale) == pytest.approx(max(-low, high) * margin / divisor, rel=1e-5)
    kept = quantizer.scale.clone()
    quantizer(torch.empty(0))
    quantizer.eval()(torch.tensor([100.0]))
    assert torch.equal(quantizer.scale, kept)
    quantizer.train().averaging_constant = 0.0
    quantizer(torch.tensor([100.0]))
    assert torch.equal(quantizer.scale, kept)


def test_a_weights_scale_is_that_of_its_values_in_train_and_eval_mode():
    quantizer = on(FakeQuant("w", 2, 0, 2))
    quantizer.averaging_constant, quantizer.half_step = 1.0, 0.5
    for mode in (True, False):
        w = torch.randn(2, 5)
        quantizer.train(mode)(w)
        assert torch.equal(quantizer.scale, w.abs().amax(1, keepdim=True) / 127.5)


def test_a_scale_that_moves_again_before_the_backward_pass_spoils_no_gradient():
    """P13: a shared module's quantizer runs twice; each call's gradient is that of its own scale."""
    for quantizer, x in ((FakeQuant("x"), torch.randn(50)), (FakeQuant("w", 5, 0, 2), torch.randn(5, 10))):
        on(quantizer).averaging_constant = 1.0
        quantizer.set_scale(torch.full_like(quantizer.scale, 0.001))
        a, b = x.clone().requires_grad_(), (x * 3).requires_grad_()
        (quantizer(a).sum() + quantizer(b).sum()).backward()
        # the largest positive value is 128 steps: code 127, outside
        assert (a.grad.sum(), b.grad.sum()) == ((a.grad != 0).sum(), (b.grad != 0).sum())
        assert (a.grad != 0).float().mean() > 0.7 and torch.equal(a.grad, b.grad)


def test_tensor_and_number_scales_give_the_same_bits():
    torch.manual_seed(0)
    for scale in torch.rand(50).tolist():
        x, scale = torch.randn(500), torch.tensor(scale)
        assert torch.equal(quantize_dequantize(x, scale, -128, 127), quantize_dequantize(x, float(scale), -128, 127))


def test_fp16_overflow_is_counted_and_clipped_on_demand():
    quantizer = on(FakeQuant("x"), QDtype.float16)
    x = torch.tensor([1.0, 1e5, -1e6])
    assert quantizer(x).tolist() == [1.0, float("inf"), -float("inf")]
    assert quantizer.overflowed == 2
    quantizer.clear_overflow()
    quantizer.clip = True
    assert quantizer(x).tolist() == [1.0, 65504.0, -65504.0]
    assert quantizer.overflowed == 2


def test_a_loaded_scale_is_the_one_that_is_used():
    saved = on(FakeQuant("x"))
    saved.set_scale(0.5)
    fresh = on(FakeQuant("x"))
    fresh.set_scale(0.1)
    fresh.load_state_dict({"scale": saved.scale})  # a state of before there were moving averages
    assert fresh(torch.tensor([0.7])).item() == 0.5
    assert fresh.sides.tolist() == [0.5, 0.5]
