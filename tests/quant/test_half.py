"""Half precision against numpy's own casts, and where it overflows."""

import numpy as np
import pytest
import torch

from qflow.quant.values.half import HALF_MAX, OVERFLOW, overflows, to_half


def test_every_half_stays_what_it_is():
    bits = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    halves = bits.view(torch.float16)
    halves = halves[halves.isfinite()].float()
    assert len(halves) == 2 * 31 * 1024
    assert torch.equal(to_half(halves), halves)
    assert torch.equal(to_half(halves, clip=True), halves)
    assert overflows(halves) == 0


@pytest.mark.parametrize(
    ("value", "rounded"),
    [
        (1 + 2**-11, 1.0),  # halfway: to even
        (1 + 3 * 2**-11, 1 + 2**-9),
        (1 + 2**-11 + 2**-20, 1 + 2**-10),
        (2049.0, 2048.0),
        (2051.0, 2052.0),
        (2**-24, 2**-24),  # the smallest subnormal
        (2**-25, 0.0),  # halfway to zero: to even
        (3 * 2**-26, 2**-24),
        (3 * 2**-25, 2**-23),
        (2**-14 - 2**-25, 2**-14),  # from the largest subnormal up
        (65519.996, HALF_MAX),
    ],
)
def test_rounding_is_to_nearest_even(value, rounded):
    x = torch.tensor([value, -value])
    assert to_half(x).tolist() == [rounded, -rounded]


def test_numpy_rounds_the_same():
    generator = torch.Generator().manual_seed(0)
    exponents = torch.randint(-30, 17, (100_000,), generator=generator)
    x = torch.randn(100_000, generator=generator) * torch.exp2(exponents.float())
    with np.errstate(over="ignore"):
        expected = x.numpy().astype(np.float16).astype(np.float32)
    assert np.array_equal(to_half(x).numpy(), expected)
    assert overflows(x) == int(np.isinf(expected).sum()) > 0


def test_overflow_starts_at_the_rounding_boundary():
    below = torch.nextafter(torch.tensor(OVERFLOW), torch.tensor(0.0))
    x = torch.stack([below, torch.tensor(OVERFLOW), -torch.tensor(OVERFLOW), torch.tensor(1e9)])
    assert to_half(x).tolist() == [HALF_MAX, torch.inf, -torch.inf, torch.inf]
    assert overflows(x) == 3
    assert to_half(x, clip=True).tolist() == [HALF_MAX, HALF_MAX, -HALF_MAX, HALF_MAX]


def test_what_was_no_number_before_is_no_overflow():
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 1.0])
    assert overflows(x) == 0
    assert to_half(x)[:2].tolist() == [torch.inf, -torch.inf]
    assert to_half(x, clip=True)[:2].tolist() == [HALF_MAX, -HALF_MAX]
    assert to_half(x).isnan().tolist() == to_half(x, clip=True).isnan().tolist() == [False, False, True, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_dtype_stays_and_the_input_too(dtype):
    x = torch.tensor([1e6, 0.1], dtype=dtype)
    before = x.clone()
    assert to_half(x, clip=True).dtype == dtype
    assert torch.equal(x, before)
    assert overflows(x) == 1
    assert overflows(torch.empty(0)) == 0
