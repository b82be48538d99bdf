"""Equalization changes how ranges lie among channels and nothing else: the float function stays."""

import copy
import functools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.forced_factors import any_factors, arguments, forced, like, powers_of_two
from support.outliers import SmallTransformer, standing_out
from support.rescaled import ResNet20, rescaled
from support.zoo import NAMES, build
from torch import nn
from zoo_real.registry import entries

import qflow
from qflow.quant.trace.calling import map_named
from qflow.repair.base.contract import Context
from qflow.repair.equalization.equalize import Equalize
from qflow.tasks import digits, dual, exposure
from qflow.tasks.perception import data as perception_data
from qflow.tasks.perception import model as perception


def applied(model, example):
    """What an equalization changes if every predicted gain counts, and what it refuses."""
    prepared = qflow.prepare(model, example)
    torch.manual_seed(3)
    inputs = [map_named(like, arguments(example)) for _ in range(4)]
    context = Context([(item, 2) for item in inputs], prepared.applied)
    step = Equalize(gain=1.1)
    parts, refused = step.parts(prepared, context)
    return step.apply(prepared, context, parts), refused


@pytest.mark.filterwarnings("ignore:The prepared model is not calibrated")
@pytest.mark.parametrize("name", NAMES)
def test_powers_of_two_leave_the_float_function_bit_for_bit(name):
    model, example = build(name)
    before = copy.deepcopy(model.state_dict())
    found = forced(qflow.prepare(model, example), example, powers_of_two)
    assert found.variables > 0 or name in ("functional", "two_inputs", "shared", "point_pillars")
    assert found.moved == 0.0
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items()), "the user's model"


@pytest.mark.filterwarnings("ignore:The prepared model is not calibrated")
@pytest.mark.slow  # it trains the models of the tasks
@pytest.mark.parametrize("task", [digits, dual, exposure, perception])
def test_the_models_of_the_built_in_tasks_keep_their_function(task):
    model, data = task.build_model(), build_data_of(task)
    images = torch.stack([data.calibration[i][0] for i in range(8)])
    found = forced(qflow.prepare(model, images), images, powers_of_two)
    assert (found.variables == 0) == (task is perception), "there a SiLU follows every convolution"
    assert found.moved == 0.0


def build_data_of(task):
    return {dual: digits.build_data, perception: perception_data.build_data}.get(
        task, getattr(task, "build_data", None)
    )()


@pytest.mark.filterwarnings("ignore:The prepared model is not calibrated")
@pytest.mark.slow  # libraries that take seconds to load
@pytest.mark.parametrize("name", ["timm_swin", "timm_mobilenetv3", "torchvision_resnet50", "transformers_detr"])
def test_real_models_keep_their_function(name):
    """benchmarks/equalize_zoo.py does it for all of them."""
    entry = entries()[name]
    if entry.missing:
        pytest.skip(f"needs {entry.missing}: pip install 'qflow[zoo]'")
    model, inputs = entry.made()
    found = forced(qflow.prepare(model, inputs(2)), inputs(2), powers_of_two)
    assert found.variables > 50 and found.moved == 0.0
    assert (found.pairs > 0) == (name in ("timm_swin", "transformers_detr")), "query and key"


@pytest.mark.parametrize(
    ("name", "groups"),
    {
        "resnet": ["blocks.0.conv1 -> blocks.0.conv2", "blocks.1.conv1 -> blocks.1.conv2"],
        "mobilenet": ["2.conv.2.0 -> 6"],
        "unet": ["up -> out"],
        "vision_transformer": ["norm1 -> qkv", "norm2 -> mlp.0", "qkv -> proj"],
        "detr": [
            "cross.in_proj_weight:2 -> cross.out_proj.weight",
            "cross.out_proj.weight -> boxes",
            "encoder.linear1 -> encoder.linear2",
            "encoder.norm2 -> cross.in_proj_weight:1",
            "encoder.self_attn.in_proj_weight -> encoder.self_attn.out_proj.weight",
        ],
        "linear_attention": ["qkv -> out"],
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
    images = torch.randn(4, 2, 4, 4, generator=torch.Generator().manual_seed(seed))
    found = forced(qflow.prepare(Chain().eval(), images), images, functools.partial(any_factors, seed=seed))
    assert found.variables == 6 + 6 + 8 + 6 + 3 and found.moved < 1e-5


class Turned(nn.Module):
    """An index that takes channels out of order, and a weight that other code reads too."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 6, 1), nn.Conv2d(6, 8, 1)
        self.c, self.d = nn.Conv2d(2, 6, 1), nn.Conv2d(6, 8, 1)
        with torch.no_grad():
            for conv in (self.a, self.c):
                conv.weight.mul_(2.0 ** (torch.arange(6) * 1.5).view(-1, 1, 1, 1))

    def forward(self, x):
        turned = torch.relu(self.a(x))[:, [0, 1, 5, 2, 3, 4]]
        return self.b(turned), self.d(torch.relu(self.c(x))) * self.c.weight.sum()


def test_channels_are_followed_out_of_order_and_a_weight_that_is_read_in_another_way_is_found_by_the_float_outputs():
    torch.manual_seed(0)
    changed, refused = applied(Turned().eval(), torch.randn(2, 2, 4, 4))
    assert list(changed) == ["a -> b"]
    assert refused["c -> d"] == "the float function would move: its weights are read in another way too"


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


@pytest.fixture(scope="module")
def transformer(data):
    """A transformer that reads digits."""
    return digits.fit(SmallTransformer, data.train, epochs=12, seed=0)


@pytest.mark.slow  # it trains the network
@pytest.mark.parametrize(("norms", "attention"), [(8, 0), (0, 8), (8, 6)])
def test_outliers_of_a_trained_transformer_cost_int8_nothing_after_equalization(data, transformer, norms, attention):
    """Behind layer norms, and in queries, keys and values: one linear layer gives all three with one scale."""
    images, digits_of = data.evaluation.tensors
    loader = data.calibration.tensors[0].split(16)
    hard = standing_out(copy.deepcopy(transformer), norms, attention)
    usual, planted = (qflow.prepare(model, loader[0]) for model in (transformer, hard))
    for prepared in (usual, planted):
        qflow.calibrate(prepared, loader)
    repaired, _ = qflow.repair_model(planted, loader)
    with torch.no_grad():
        nets = transformer, hard, planted, repaired
        right = [float((net(images).argmax(1) == digits_of).float().mean()) for net in nets]
    assert abs(right[1] - right[0]) < 1e-6 and right[2] < right[0] - 0.2
    assert right[3] > right[0] - 0.015
    assert error(repaired, hard, images) < 1.2 * error(usual, transformer, images)


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
