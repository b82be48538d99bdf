"""Pure integer arithmetic: what a device with these grids computes, as the reference of fake quantization.

    codes       q = clamp(rint(x / s), qmin, qmax)
    accumulate  sum over products of codes, in 32 bits for int8 x int8 (wraps around), in 64 for int16
    requantize  q_out = clamp(rint(acc * s_in * s_w / s_out), qmin, qmax), half to even, in float64

Scales are float32 numbers, so s_in * s_w is exact in float64; the bias is a code of the accumulator's own grid.
Arrays are numpy int64 throughout. Left out: a device's own multiplier width in requantization.
"""

import numpy as np

LIMITS = {8: (-128, 127), 16: (-32768, 32767)}


def encode(x, scale, bits=8):
    """Codes of real values; `scale` is a number or broadcasts (weights per channel)."""
    codes = np.rint(np.asarray(x, dtype=np.float64) / np.asarray(scale, dtype=np.float64))
    return np.clip(codes, *LIMITS[bits]).astype(np.int64)


def on_grid(x, scale):
    """Codes of values that already lie on the grid, without clamping."""
    codes = np.asarray(x, dtype=np.float64) / np.asarray(scale, dtype=np.float64)
    assert np.abs(codes - np.rint(codes)).max(initial=0.0) < 0.01, "values off the grid"
    return np.rint(codes).astype(np.int64)


def wrap(accumulator, bits):
    """Two's complement: what an accumulator of `bits` holds."""
    if bits >= 64:
        return accumulator
    half = 1 << (bits - 1)
    return (accumulator + half) % (2 * half) - half


def accumulator_bits(weight, activation_bits=8):
    """Bits that hold every sum of `weight` codes ([output channel, ...]) times activations at their most negative."""
    worst = int(np.abs(weight.reshape(len(weight), -1)).sum(1).max()) * -LIMITS[activation_bits][0]
    return worst.bit_length() + 1


def requantize(accumulator, real, bits=8, relu=False):
    """Output codes; `real` is what one step of the accumulator is worth in output steps."""
    codes = np.rint(accumulator.astype(np.float64) * real)
    low, high = LIMITS[bits]
    return np.clip(codes, 0 if relu else low, high).astype(np.int64)


def _finish(accumulator, s_in, s_weight, s_out, bias, axis, bits, wide, relu):
    """Bias, width, requantization; `axis` holds the output channels."""
    shape = [1] * accumulator.ndim
    shape[axis] = -1
    step = np.float64(s_in) * np.asarray(s_weight, dtype=np.float64).reshape(-1)
    step = step.reshape(shape) if step.size > 1 else step.reshape([1] * accumulator.ndim)
    if bias is not None:
        accumulator = accumulator + np.rint(np.asarray(bias, dtype=np.float64).reshape(shape) / step).astype(np.int64)
    return requantize(wrap(accumulator, wide), step / np.float64(s_out), bits, relu)


def conv2d(x, weight, s_in, s_weight, s_out, bias=None, stride=1, padding=0, groups=1, bits=8, wide=32, relu=False):
    """x [N,C,H,W] and weight [O,C/groups,K,K] are codes; `bits` is the output's width, `wide` the accumulator's."""
    kernel, per_group, out_group = weight.shape[2:], weight.shape[1], len(weight) // groups
    padded = np.pad(x, [(0, 0), (0, 0), (padding, padding), (padding, padding)])
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel, axis=(2, 3))[:, :, ::stride, ::stride]
    parts = []
    for group in range(groups):
        inputs = windows[:, group * per_group : (group + 1) * per_group]
        rows = inputs.transpose(0, 2, 3, 1, 4, 5).reshape(*inputs.shape[:1], *inputs.shape[2:4], -1)
        kernels = weight[group * out_group : (group + 1) * out_group].reshape(out_group, -1)
        parts.append((rows @ kernels.T).transpose(0, 3, 1, 2))
    return _finish(np.concatenate(parts, 1), s_in, s_weight, s_out, bias, 1, bits, wide, relu)


def linear(x, weight, s_in, s_weight, s_out, bias=None, bits=8, wide=32, relu=False):
    """x [..., K] and weight [O, K] are codes."""
    return _finish(x @ weight.T, s_in, s_weight, s_out, bias, x.ndim - 1, bits, wide, relu)


def matmul(a, b, s_a, s_b, s_out, bits=8, wide=32):
    """Product of two activations."""
    return _finish(a @ b, s_a, s_b, s_out, None, a.ndim - 1, bits, wide, False)


def add(a, b, s_a, s_b, s_out, bits=8, relu=False):
    """Sum of two activations on different grids."""
    value = a * np.float64(s_a) + b * np.float64(s_b)
    return requantize(value, 1.0 / np.float64(s_out), bits, relu)


def mismatch(fake, exact):
    """(largest difference in steps, share of codes that differ)."""
    gap = np.abs(fake - exact)
    return int(gap.max(initial=0)), float((gap > 0).mean())
