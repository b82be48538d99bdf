"""Equalization changes how ranges lie among channels and nothing else: the float function stays."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.rescaled import ResNet20, rescaled
from support.zoo import NAMES, build
from torch import nn
from zoo_real.registry import entries

import qflow
from qflow.quant.trace.calling import call_model, map_named, named_tensors
from qflow.repair.channels import Channels
from qflow.repair.contract import Context
from qflow.repair.equalize import Equalize, scale_columns, scale_rows
from qflow.tasks import digits, dual, exposure
from qflow.tasks.perception import data as perception_data
from qflow.tasks.perception import model as perception


def like(_, tensor):
    return torch.randn_like(tensor) if tensor.is_floating_point() else tensor


def applied(model, example):
    """What an equalization changes if every predicted gain counts, and what it refuses."""
    prepared = qflow.prepare(model, example)
    torch.manual_seed(3)
    inputs = [map_named(like, example if isinstance(example, (dict, tuple)) else (example,)) for _ in range(4)]
    context = Context([(item, 2) for item in inputs], prepared.applied)
    step = Equalize(gain=1.1)
    parts, refused = step.parts(prepared, context)
    return step.apply(prepared, context, parts), refused


def scale_all(prepared, factors_of):
    """Multiply all channels that may have a factor by those of `factors_of(count)`; return how many there are."""
    channels = Channels(prepared)
    factors = factors_of(len(channels.parent))
    for variable in channels.fixed:
        factors[variable] = 1.0
    with torch.no_grad():
        for member in channels.producers.values():
            scale_rows(member.module, channels.along(member.ids, factors))
        for member in channels.consumers.values():
            scale_columns(member.module, 1 / channels.along(member.ids, factors))
    return len({channels.find(variable) for variable in range(len(channels.parent))} - channels.fixed.keys())


def powers_of_two(count):
    return 2.0 ** torch.randint(-6, 7, (count,), generator=torch.Generator().manual_seed(7))


def moved(model, prepared, inputs):
    """The largest relative difference of a float output."""
    inputs = inputs if isinstance(inputs, (dict, tuple)) else (inputs,)
    with torch.no_grad():
        pairs = zip(named_tensors(call_model(model, inputs)), named_tensors(call_model(prepared, inputs)), strict=True)
        return max(float((b - a).norm() / a.norm()) for (_, a), (_, b) in pairs if a.is_floating_point())


@pytest.mark.filterwarnings("ignore:The prepared model is not calibrated")
@pytest.mark.parametrize("name", NAMES)
def test_powers_of_two_leave_the_float_function_bit_for_bit(name):
    model, example = build(name)
    before = copy.deepcopy(model.state_dict())
    prepared = qflow.prepare(model, example)
    scaled = scale_all(prepared, powers_of_two)
    assert scaled > 0 or name in ("functional", "two_inputs", "shared", "point_pillars", "linear_attention")
    assert moved(model, prepared, map_named(like, example)) == 0.0
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items()), "the user's model"


@pytest.mark.filterwarnings("ignore:The prepared model is not calibrated")
@pytest.mark.slow  # it trains the models of the tasks
@pytest.mark.parametrize("task", [digits, dual, exposure, perception])
def test_the_models_of_the_built_in_tasks_keep_their_function(task):
    model, data = task.build_model(), build_data_of(task)
    images = torch.stack([data.calibration[i][0] for i in range(8)])
    prepared = qflow.prepare(model, images)
    scaled = scale_all(prepared, powers_of_two)
    assert (scaled == 0) == (task is perception), "there a SiLU follows every convolution"
    assert moved(model, prepared, images) == 0.0


def build_data_of(task):
    return {dual: digits.build_data, perception: perception_data.build_data}.get(
        task, getattr(task, "build_data", None)
    )()


@pytest.mark.filterwarnings("ignore:The prepared model is not calibrated")
@pytest.mark.slow  # libraries that take seconds to load
@pytest.mark.parametrize("name", ["timm_swin", "timm_mobilenetv3", "torchvision_resnet50", "transformers_detr"])
def test_real_models_keep_their_function(name):
    entry = entries()[name]
    if entry.missing:
        pytest.skip(f"needs {entry.missing}: pip install 'qflow[zoo]'")
    model, inputs = entry.made()
    prepared = qflow.prepare(model, inputs(2))
    assert scale_all(prepared, powers_of_two) > 50
    assert moved(model, prepared, inputs(3)) == 0.0


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
    changed, refused = applied(*build(name))
    found = [*changed, *(part for part in refused if "->" in part)]
    assert sorted(part.partition(" and ")[0] for part in found) == groups


def test_reasons_name_what_reads_the_channels():
    _, refused = applied(*build("mobilenet"))
    assert refused["0.0"] == "ReLU6 bounds it, and the bound would have to move with each channel"
    assert refused["6"] == "its result is an output of the model"
    assert applied(*build("squeeze_excite"))[1]["stem.0"] == "Hardswish reads it"


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
    changed, refused = applied(Chain().eval(), torch.randn(2, 2, 4, 4))
    groups = ["first -> depthwise", "depthwise -> grouped", "grouped -> up", "up and 1 more -> mixed", "mixed -> head"]
    assert {*changed, *refused} == {*groups, "head"} and len(changed) >= 3
    assert refused["head"] == "its result is an output of the model"


@pytest.mark.filterwarnings("ignore:The prepared model is not calibrated")
@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6))
def test_any_factors_leave_the_function_within_rounding(seed):
    torch.manual_seed(0)
    model, generator = Chain().eval(), torch.Generator().manual_seed(seed)
    prepared = qflow.prepare(model, torch.randn(2, 2, 4, 4))
    assert (
        scale_all(prepared, lambda count: 10 ** (torch.rand(count, generator=generator) * 4 - 2)) == 6 + 6 + 8 + 6 + 3
    )
    assert moved(model, prepared, torch.randn(4, 2, 4, 4, generator=generator)) < 1e-5


class Turned(nn.Module):
    """An index that takes channels out of order, and a group beside it."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 6, 1), nn.Conv2d(6, 8, 1)
        self.c, self.d = nn.Conv2d(2, 6, 1), nn.Conv2d(6, 8, 1)
        with torch.no_grad():
            for conv in (self.a, self.c):
                conv.weight.mul_(2.0 ** (torch.arange(6) * 1.5).view(-1, 1, 1, 1))

    def forward(self, x):
        turned = torch.relu(self.a(x))[:, [0, 1, 5, 2, 3, 4]]
        return self.b(turned), self.d(torch.relu(self.c(x))[:, :, 1:, 1:])


def test_channels_out_of_order_are_found_by_the_float_outputs():
    torch.manual_seed(0)
    changed, refused = applied(Turned().eval(), torch.randn(2, 2, 4, 4))
    assert list(changed) == ["c -> d"]
    assert refused["a -> b"] == "the float function would move: its channels are taken out of order"


@pytest.mark.parametrize("name", ["vision_transformer", "convnext"])
def test_outliers_of_a_layer_norm_are_folded_into_the_linear_that_reads_it(name):
    """Two channels of a norm 200 times as large, as trained transformers have them; float is the same."""

    def planted(model, factor):
        pairs = [("norm1", "qkv"), ("norm2", "mlp.0")] if name == "vision_transformer" else [("norm", "wide")]
        with torch.no_grad():
            for norm, reader in pairs:
                for vector in model.get_submodule(norm).parameters():
                    vector[:2] *= factor
                model.get_submodule(reader).weight[:, :2] /= factor
        return model

    errors = {}
    torch.manual_seed(2)
    loader = torch.randn(32, 3, 16, 16).split(8)
    for factor in (1.0, 200.0):
        model, example = build(name)
        planted(model, factor)
        prepared = qflow.prepare(model, example)
        repaired, table = qflow.repair_model(prepared, loader)
        images = torch.randn(32, 3, 16, 16, generator=torch.Generator().manual_seed(9))
        errors[factor] = table.before, table.after, error(repaired, model, images)
    assert errors[200.0][0] > 4 * errors[1.0][0]
    assert errors[200.0][1] < 1.25 * errors[1.0][1] and errors[200.0][2] < 1.25 * errors[1.0][2]


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


@pytest.mark.slow  # it trains the network
def test_the_dual_task_reaches_its_float_accuracy_in_int8(data):
    """There, no mix of int8, int16 and fp16 does."""
    model, loader = dual.build_model(), data.calibration.tensors[0].split(32)
    images, digits_of = data.evaluation.tensors
    prepared = qflow.prepare(model, loader[0])
    qflow.calibrate(prepared, loader)
    repaired, table = qflow.repair_model(prepared, loader)
    with torch.no_grad():
        right = [float((net(images).argmax(1) == digits_of).float().mean()) for net in (model, prepared, repaired)]
    assert right[1] < right[0] - 0.5 and right[2] > right[0] - 0.01
    assert table.forwards <= 5 * len(data.calibration), "five passes over the data"
