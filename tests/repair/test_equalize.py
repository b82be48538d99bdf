"""Equalization changes how ranges lie among channels and nothing else: the float function stays."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.rescaled import ResNet20, rescaled
from support.zoo import NAMES, build
from torch import nn

import qflow
from qflow.quant.trace.calling import call_model, map_named, named_tensors
from qflow.repair.channels import Channels
from qflow.repair.contract import Context
from qflow.repair.equalize import Equalize, scale_columns, scale_rows
from qflow.tasks import digits


def applied(model, example, samples=8):
    """A prepared model with every group scaled, whether or not that helps."""
    prepared = qflow.prepare(model, example)
    inputs = example if isinstance(example, (dict, tuple)) else (example,)
    torch.manual_seed(3)
    batches = [(map_named(like, inputs), 2) for _ in range(samples // 2)]
    context = Context(batches, prepared.applied)
    step = Equalize(gain=1.1)
    parts, refused = step.parts(prepared, context)
    changed = step.apply(prepared, context, parts)
    return prepared, batches, changed, refused


def like(_, tensor):
    return torch.randn_like(tensor) if tensor.is_floating_point() else tensor


def moved(model, prepared, batches):
    """The largest relative difference of an output."""
    worst = 0.0
    with torch.no_grad():
        for inputs, _ in batches:
            pairs = zip(
                named_tensors(call_model(model, inputs)), named_tensors(call_model(prepared, inputs)), strict=True
            )
            worst = max(worst, *(float((b - a).norm() / a.norm()) for (_, a), (_, b) in pairs if a.is_floating_point()))
    return worst


@pytest.mark.parametrize("name", NAMES)
def test_the_float_function_stays_within_rounding(name):
    model, example = build(name)
    before = copy.deepcopy(model.state_dict())
    prepared, batches, _, _ = applied(model, example)
    assert moved(model, prepared, batches) < 1e-5
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items()), "the user's model"


@pytest.mark.parametrize(
    ("name", "groups"),
    {
        "resnet": ["blocks.0.conv1 -> blocks.0.conv2", "blocks.1.conv1 -> blocks.1.conv2"],
        "mobilenet": ["2.conv.2.0 -> 6"],
        "unet": ["up -> out"],
        "vision_transformer": ["norm1 -> qkv", "norm2 -> mlp.0"],
        "detr": ["encoder.linear1 -> encoder.linear2"],
        "dense": ["layers.l0.0 -> layers.l0.2", "layers.l1.0 -> layers.l1.2", "layers.l1.2 -> head"],
    }.items(),
)
def test_the_groups_of_known_networks(name, groups):
    _, _, changed, _ = applied(*build(name))
    assert [part.partition(" and ")[0] for part in changed] == groups


def test_reasons_name_what_reads_the_channels():
    _, _, _, refused = applied(*build("mobilenet"))
    assert refused["0.0"] == "ReLU6 bounds it, and the bound would have to move with each channel"
    assert refused["6"] == "its result is an output of the model"
    assert applied(*build("squeeze_excite"))[3]["stem.0"] == "Hardswish reads it"


class Chain(nn.Module):
    """Everything that a factor passes: depthwise, grouped, transposed, pooling, PReLU, an add, a concat, a flatten."""

    def __init__(self):
        super().__init__()
        self.first, self.prelu = nn.Conv2d(2, 6, 1), nn.PReLU(6)
        self.depthwise, self.leaky = nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.LeakyReLU(0.2)
        self.grouped, self.up = nn.Conv2d(6, 8, 1, groups=2), nn.ConvTranspose2d(8, 6, 2, 2, groups=2)
        self.branch, self.pool = nn.Conv2d(2, 6, 1), nn.MaxPool2d(2)
        self.mixed, self.head = nn.Conv2d(12, 3, 1), nn.Linear(3 * 16, 4)

    def forward(self, x):
        y = self.leaky(self.depthwise(self.prelu(self.first(x))))
        y = self.pool(self.up(self.grouped(y))) * 0.5
        b = self.branch(x)
        y = torch.cat([y + b, torch.relu(b)], 1)
        return self.head(torch.relu(self.mixed(y)).flatten(1))


def test_a_factor_passes_through_all_that_is_homogeneous():
    torch.manual_seed(0)
    model = Chain().eval()
    prepared, batches, changed, refused = applied(model, torch.randn(2, 2, 4, 4))
    assert list(changed) == [
        "first -> depthwise",
        "depthwise -> grouped",
        "grouped -> up",
        "up and 1 more -> mixed",
        "mixed -> head",
    ]
    assert refused == {"head": "its result is an output of the model"}
    assert moved(model, prepared, batches) < 1e-5


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6))
def test_any_factors_leave_the_function(seed):
    torch.manual_seed(0)
    model = Chain().eval()
    prepared = qflow.prepare(model, torch.randn(2, 2, 4, 4))
    channels = Channels(prepared)
    generator = torch.Generator().manual_seed(seed)
    factors = 10 ** (torch.rand(len(channels.parent), generator=generator) * 4 - 2)
    for variable in channels.fixed:
        factors[variable] = 1.0
    with torch.no_grad():
        for member in channels.producers.values():
            scale_rows(member.module, channels.along(member.ids, factors))
        for member in channels.consumers.values():
            scale_columns(member.module, 1 / channels.along(member.ids, factors))
    assert moved(model, prepared, [((torch.randn(4, 2, 4, 4, generator=generator),), 4)]) < 1e-5


@pytest.fixture(scope="module")
def data():
    return digits.build_data()


@pytest.fixture(scope="module")
def plain(data):
    """A residual network that reads digits."""
    return digits.fit(ResNet20, data.train, epochs=4, seed=0)


def error(prepared, model, images):
    with torch.no_grad(), prepared.quantized():
        wanted = model(images)
        return float((prepared(images) - wanted).norm() / wanted.norm())


@pytest.mark.slow  # it trains the network
def test_rescaled_channels_cost_int8_nothing_after_equalization(data, plain):
    images, digits_of = data.evaluation.tensors
    loader = data.calibration.tensors[0].split(16)

    def right(model):
        with torch.no_grad():
            return float((model(images).argmax(1) == digits_of).float().mean())

    hard = rescaled(copy.deepcopy(plain))
    usual, planted = (qflow.prepare(model, loader[0]) for model in (plain, hard))
    for prepared in (usual, planted):
        qflow.calibrate(prepared, loader)
    assert abs(right(hard) - right(plain)) < 1e-6 and right(planted) < right(plain) - 0.2
    repaired, table = qflow.repair_model(planted, loader)
    (kept,) = [row for row in table.rows if row.verdict == "kept"]
    assert kept.parts == tuple(f"blocks.{i}.conv1 -> blocks.{i}.conv2" for i in (1, 4, 7))
    assert right(repaired) >= right(plain) - 0.01
    assert error(planted, hard, images) > 10 * error(usual, plain, images)
    assert error(repaired, hard, images) < 1.1 * error(usual, plain, images)
