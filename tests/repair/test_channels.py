"""Channels are followed through whatever moves, joins, sums or multiplies them; what ends them has a reason."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from support.forced_factors import any_factors, forced, powers_of_two
from torch import nn

import qflow
from qflow.repair.equalization.channels import Channels
from qflow.repair.equalization.variables import Variables

pytestmark = pytest.mark.filterwarnings("ignore:The prepared model is not calibrated")
DIM, HEADS = 8, 2


class Between(nn.Module):
    """Two linear layers, what stands between them in `between`."""

    def __init__(self, between, width=DIM, read=DIM):
        super().__init__()
        self.first, self.last, self.between = nn.Linear(DIM, width), nn.Linear(read, DIM), between

    def forward(self, x):
        return self.last(self.between(self.first(x)))


class Images(nn.Module):
    """The same with convolutions."""

    def __init__(self, between, width=DIM, read=DIM):
        super().__init__()
        self.first, self.last, self.between = nn.Conv2d(3, width, 3, padding=1), nn.Conv2d(read, 3, 1), between

    def forward(self, x):
        return self.last(self.between(self.first(x)))


class Own(nn.Module):
    """A function, with the parameters that it names."""

    def __init__(self, function, **shapes):
        super().__init__()
        self.function = function
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.rand(shape) + 0.5))

    def forward(self, x):
        return self.function(self, x)


TOKENS, PICTURES, GRID = torch.randn(1, 6, DIM), torch.randn(1, 3, 8, 8), torch.rand(1, 4, 4, 2)


def found(model, example, factors=powers_of_two):
    """What factors on all channels do to `model`, and its groups."""
    model = model.eval()
    result = forced(qflow.prepare(model, example), example, factors)
    assert result.moved <= (0.0 if factors is powers_of_two else 1e-5)
    return result


def windows(_, x):
    """Swin's: shifted windows as a batch of their own, and back."""
    n, c, h, w = x.shape
    x = torch.roll(x.permute(0, 2, 3, 1), (-1, -1), (1, 2))
    x = x.view(n, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
    x = x.view(n, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
    return torch.roll(x, (1, 1), (1, 2)).permute(0, 3, 1, 2)


def written(_, x):
    """Slices written into a tensor of zeros, in another order."""
    out = torch.zeros_like(x)
    out[:, : DIM // 2] = x[:, DIM // 2 :]
    out[:, DIM // 2 :] = x[:, : DIM // 2]
    return out


def merged(_, x):
    """Swin's patch merging: four positions side by side."""
    x = x.permute(0, 2, 3, 1)
    x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
    return x.permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("between", "channels"),
    {
        "roll, window partition": (Own(windows), DIM),
        "writes into a part": (Own(written), DIM),
        "split and joined": (Own(lambda _, x: torch.cat(x.split([3, 5], 1)[::-1], 1)), DIM),
        "out of order": (Own(lambda _, x: x[:, torch.randperm(DIM, generator=torch.Generator().manual_seed(0))]), DIM),
        "flipped": (Own(lambda _, x: x.flip(1)), DIM),
        "padded with zeros": (nn.ZeroPad2d(1), DIM),
        "average pool that counts the padding": (nn.AvgPool2d(3, 1, 1, count_include_pad=True), DIM),
        "bilinear": (nn.Upsample(scale_factor=2, mode="bilinear"), DIM),
        "clamp from below": (Own(lambda _, x: x.clamp(min=0)), DIM),
        "branches of an add": (Own(lambda _, x: F.relu(x) + F.leaky_relu(x.abs(), 0.1)), DIM),
        "where zero": (Own(lambda _, x: torch.where(x > 1.0, x, torch.zeros_like(x))), 0),
        "grid_sample": (Own(lambda _, x: F.grid_sample(x, GRID.expand(len(x), -1, -1, -1), align_corners=False)), DIM),
        "group norm": (nn.GroupNorm(2, DIM), DIM),
        "softmax over channels": (nn.Softmax(1), 0),
        "normalized": (Own(lambda _, x: F.normalize(x, dim=1)), 0),
        "padded with ones": (nn.ConstantPad2d(1, 1.0), 0),
        "clamp with bounds": (nn.Hardtanh(-1, 1), 0),
        "square": (Own(lambda _, x: x * x), 0),
        "constant added": (Own(lambda _, x: x + 1.0), 0),
    }.values(),
    ids=lambda value: "",
)
def test_images(between, channels):
    assert found(Images(between), PICTURES).variables == channels


def test_channels_that_moves_mix_share_a_factor():
    """PixelShuffle makes 4 channels of 16, patch merging 32 of 8, and a view without order has one factor for all."""
    assert found(Images(nn.PixelShuffle(2), width=16, read=4), PICTURES).variables == 4
    assert found(Images(Own(merged), read=4 * DIM), PICTURES).variables == DIM
    mixing = Own(lambda _, x: x.permute(0, 2, 3, 1).reshape(-1, DIM, 8, 8))
    assert found(Images(mixing), PICTURES).variables == 1
    assert found(Images(mixing), PICTURES, any_factors).variables == 1


class Gated(nn.Module):
    """SwiGLU: the gate stays as it is, the other branch passes."""

    def __init__(self):
        super().__init__()
        self.norm = nn.Parameter(torch.rand(DIM) + 0.5)
        self.gate, self.up, self.down = nn.Linear(DIM, 12), nn.Linear(DIM, 12), nn.Linear(12, DIM)

    def forward(self, x):
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.norm
        return self.down(F.silu(self.gate(x)) * self.up(x))


def test_a_gated_mlp_behind_an_rms_norm_of_the_users_own():
    assert found(Gated(), TOKENS).groups == ("norm -> gate and 1 more", "up -> down")


def rotated(x):
    half = x.shape[-1] // 2
    return torch.cat([-x[..., half:], x[..., :half]], -1)


class Attention(nn.Module):
    """Self-attention in many ways; `how` computes it from q, k and v [1, heads, tokens, channels of a head]."""

    def __init__(self, how, key_heads=HEADS):
        super().__init__()
        self.how, self.key_heads = how, key_heads
        width = DIM // HEADS * (HEADS + 2 * key_heads)
        self.qkv, self.proj = nn.Linear(DIM, width), nn.Linear(DIM, DIM)
        angles = torch.rand(6, DIM // HEADS // 2)
        self.register_buffer("cos", torch.cat([angles, angles], -1).cos())
        self.register_buffer("sin", torch.cat([angles, angles], -1).sin())

    def forward(self, x):
        heads = self.qkv(x).view(len(x), 6, -1, DIM // HEADS).transpose(1, 2)
        y = self.how(self, *heads.split([HEADS, self.key_heads, self.key_heads], 1))
        return self.proj(y.transpose(1, 2).reshape(len(x), 6, DIM))


def rotary(self, q, k, v):
    q, k = (x * self.cos + rotated(x) * self.sin for x in (q, k))
    return F.scaled_dot_product_attention(q, k, v)


def einsum(_, q, k, v):
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k).softmax(-1)
    return torch.einsum("bhqk,bhkd->bhqd", scores, v)


def cosine(_, q, k, v):
    return (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)).softmax(-1) @ v


def grouped(_, q, k, v):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def linear(_, q, k, v):
    """Keys times values first: keys and queries are positive by an ELU, which ends them."""
    return F.elu(q) @ (F.elu(k).transpose(-2, -1) @ v)


def own_masked(_, q, k, v):
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    return (q * 0.5 @ k.transpose(-2, -1)).masked_fill(~mask, float("-inf")).softmax(-1) @ v


@pytest.mark.parametrize(
    ("how", "key_heads", "pairs", "channels"),
    [
        (lambda _, *qkv: F.scaled_dot_product_attention(*qkv, is_causal=True), HEADS, 1, 2 * DIM),
        (einsum, HEADS, 1, 2 * DIM),
        (own_masked, HEADS, 1, 2 * DIM),
        (rotary, HEADS, 1, DIM // 2 + DIM),  # two channels are turned into each other
        (grouped, 1, 1, DIM // HEADS + DIM // HEADS),  # two query heads read one key head
        (cosine, HEADS, 0, DIM),
        (linear, HEADS, 0, DIM),
    ],
    ids=["fused", "einsum", "masked", "rotary", "grouped", "cosine", "linear"],
)
def test_attention(how, key_heads, pairs, channels):
    """One linear layer gives query, key and value: its rows belong to several factors, its columns to the norm."""
    result = found(Attention(how, key_heads), TOKENS)
    assert (result.pairs, result.variables) == (pairs, channels)
    assert found(Attention(how, key_heads), TOKENS, any_factors).variables == channels


def test_a_weight_that_other_code_reads_too_stays_as_it_is():
    """An embedding that is the head's weight; a part of a parameter that overlaps with another part."""

    def both(self, x):
        return F.linear(x, self.weight[:DIM]), F.linear(x, self.weight[4:])

    model = Between(nn.Identity())
    model.last = Own(both, weight=(12, DIM))
    assert found(model, TOKENS).variables == 0
    model.last = Own(lambda self, x: (F.linear(x, self.weight[:4]), F.linear(x, self.weight[4:])), weight=(12, DIM))
    assert found(model, TOKENS).variables == DIM


def test_an_lstm_and_an_index_of_the_data_end_with_a_reason():
    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.lstm, self.last = nn.Linear(DIM, DIM), nn.LSTM(DIM, DIM), nn.Linear(DIM, 3)

        def forward(self, x):
            return self.last(self.lstm(F.relu(self.first(x)))[0])

    assert found(Recurrent(), TOKENS).reasons["lstm reads it"] == 1

    def best(_, x):
        place = x.mean(-1).topk(3, dim=1).indices
        return x.gather(1, place.unsqueeze(-1).expand(-1, -1, DIM))

    prepared = qflow.prepare(Between(Own(best)).eval(), TOKENS)
    channels = Channels(prepared, (TOKENS,))
    (first, _) = channels.producers.values()
    assert channels.variables.reason(float(first.ids[0])) == "topk reads it"


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(2, 9), st.integers(2, 9), st.sampled_from([1, -1])), max_size=14))
def test_factors_that_follow_from_equations_fulfil_them(equations):
    variables = Variables()
    variables.new(8)
    for a, b, sign in equations:
        variables.equal(torch.tensor([float(a)]), torch.tensor([float(sign * b)]), "")
    free = variables.free_roots(torch.arange(10))
    logs = torch.zeros(10)
    logs[free] = torch.randn(len(free))
    factor = logs[variables.root] * variables.sign
    assert all(factor[a] == sign * factor[b] for a, b, sign in equations)
