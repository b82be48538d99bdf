"""The contract that both engines keep, and what engine=plugin says where the plugin differs from the prediction.

The plugin is the stand-in of tests/support/stand_in: another implementation of the published semantics.
"""

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from support.installed_plugin import installed
from torch import nn
from torch.utils.data import TensorDataset

from qflow.config.device_file import load_cost, load_rules
from qflow.core.dtype import QDtype
from qflow.core.engine import EngineName
from qflow.core.errors import ConfigError, TrialError
from qflow.core.record import from_dict, to_json
from qflow.core.settings import CalibrationSettings, QatSettings, QConfigSettings, TrialSettings
from qflow.plugin.check_file import read_check
from qflow.plugin.engine import PluginEngine
from qflow.quant.model.quantized_model import scales
from qflow.study.assemble import make_engine
from qflow.tasks.task import make_task
from qflow.trial.evaluator import Evaluator
from qflow.trial.record import EngineCall

ENGINES = list(EngineName)
ALIKE = CalibrationSettings(method="minmax", divisor="plugin", int16_margin=1.0, batch_size=8, steps=1)
"""The settings under which qflow's grid is the plugin's: one batch, largest values, half a step less."""


class Net(nn.Module):
    """What the canonicaliser has rules for: a pool, a conv that an add follows, a product of two activations."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm, self.relu = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
        self.pool, self.conv2, self.head = nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, padding=1), nn.Linear(16, 5)

    def forward(self, x):
        x = self.pool(self.relu(self.norm(self.conv1(x))))
        x = torch.relu(self.conv2(x) + x)
        rows = x.flatten(2)
        return self.head(torch.matmul(torch.sigmoid(rows), rows.transpose(1, 2)).flatten(1))


class Likeness:
    name, direction = "likeness", "maximize"

    def __call__(self, outputs, batch):
        return -((outputs - batch[1]) ** 2).mean(1)


@pytest.fixture(scope="module")
def plugin():
    with installed():
        yield


@pytest.fixture(scope="module")
def task():
    torch.manual_seed(0)
    model, images = Net().eval(), torch.rand(24, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        samples = TensorDataset(images, model(images))

    class Data:
        calibration = evaluation = samples

    return make_task(name="net", model=model, data=Data, metric=Likeness())


@pytest.fixture
def evaluator(task, plugin):
    made = Evaluator(task, load_rules("nash-m"), load_cost("nash-m"), default_calibration=ALIKE, eval_batch=12)
    made.measure_float()
    return made


def quantized(evaluator, engine, settings=None, calibration=ALIKE):
    requested, applied = evaluator.resolve(settings or QConfigSettings(template="qint16"))
    return make_engine(engine).quantize(evaluator, requested, applied, calibration)


# ---- what a trial asks of an engine --------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ENGINES)
def test_an_engine_gives_a_model_that_runs_and_tells_what_it_computes_with(engine, evaluator):
    made, inputs = quantized(evaluator, engine), (evaluator.task.data.evaluation.tensors[0],)
    assert made.samples == 8 and made.qconfig.ops.keys() == {node.name for node in evaluator.graph.quantized}
    with made.running() as model, torch.no_grad():
        outputs = model(*inputs)
    exact = evaluator.task.data.evaluation.tensors[1]
    assert 0 < (outputs - exact).norm() < 0.05 * exact.norm()
    for name, value in made.outputs(inputs).items():
        op, scale = made.qconfig.ops[name], float(made.model.outputs[name].scale)
        if op.output is not None:  # the output lies on the grid of dtype and scale
            codes = value / scale
            assert torch.allclose(codes, codes.round(), atol=2e-3 if op.output == QDtype.qint8 else 0.2), name
            assert codes.min() >= op.output.qmin - 0.5 and codes.max() <= op.output.qmax + 0.5, name
    with made.model.quantized() as own, torch.no_grad():  # what is stored and loaded computes alike
        assert (own(*inputs) - outputs).norm() < 1e-2 * outputs.norm()
    assert bool(made.calls) == (engine == EngineName.plugin)


@pytest.mark.parametrize("engine", ENGINES)
def test_equal_states_are_equal_numbers(engine, evaluator):
    first = to_json(quantized(evaluator, engine).state)
    assert to_json(quantized(evaluator, engine, QConfigSettings(template="qint8")).state) != first
    assert to_json(quantized(evaluator, engine).state) == first


@pytest.mark.parametrize("template", ["qint8", "qint16"])
def test_both_engines_agree_on_dtypes_scales_and_outputs(template, evaluator):
    inputs, settings = (evaluator.task.data.evaluation.tensors[0],), QConfigSettings(template=template)
    own = quantized(evaluator, EngineName.qflow, settings)
    expected = own.outputs(inputs)
    before = scales(own.model)
    other = quantized(evaluator, EngineName.plugin, settings)
    assert other.qconfig.digest == own.qconfig.digest and other.findings({}) == ()
    for name, scale in scales(other.model).items():
        assert scale == pytest.approx(before[name], rel=1e-6), name
    found = other.outputs(inputs)
    assert found.keys() == expected.keys() and len(found) == evaluator.graph.n_operators
    for name, value in found.items():  # the largest weight is at 127.5 steps: rounding decides its code
        assert (value - expected[name]).norm() < 1e-2 * expected[name].norm(), name


def test_of_two_int16_inputs_of_a_product_both_engines_keep_the_more_sensitive(evaluator):
    (product,) = [node for node in evaluator.graph.nodes if node.kind.value == "matmul"]
    first, second = (evaluator.graph.source(name)[0] for name in product.inputs)
    for kept, lowered in ((first, second), (second, first)):
        evaluator.precisions.__dict__["scores"] = {kept: 2.0, lowered: 1.0}
        ops = quantized(evaluator, EngineName.plugin).qconfig.ops
        assert (ops[kept].output, ops[lowered].output) == (QDtype.qint16, QDtype.qint8)
        assert ops[lowered].fallback and "the plugin" not in ops[lowered].fallback  # as predicted


def test_a_model_with_stubs_of_its_own_is_taken_as_it_is(plugin):
    """Named inputs and outputs, a FloatFunctional, and a vector operator at fp16."""
    from horizon_plugin_pytorch.quantization import DeQuantStub, QuantStub

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.quant_a, self.quant_b, self.end_a, self.end_b = QuantStub(), QuantStub(), DeQuantStub(), DeQuantStub()
            self.conv, self.act, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.SiLU(), nn.Conv2d(4, 2, 1)
            self.sum = torch.ao.nn.quantized.FloatFunctional()

        def forward(self, image, other):
            x = self.sum.add(self.act(self.conv(self.quant_a(image))), self.quant_b(other))
            return {"a": self.end_a(self.head(x)), "b": [self.end_b(x * 0.5)]}

    samples = [{"image": torch.rand(3, 8, 8) - 0.5, "other": torch.rand(4, 8, 8)} for _ in range(8)]
    data = SimpleNamespace(calibration=samples, evaluation=samples)

    class Size(Likeness):
        def __call__(self, outputs, batch):
            return outputs["a"].flatten(1).norm(dim=1)

    own_task = make_task(name="own", model=Own().eval(), data=data, metric=Size())
    made = Evaluator(own_task, load_rules("nash-m"), load_cost("nash-m"))
    requested, applied = made.resolve(QConfigSettings(template="qint16", modules={"act": "float16"}))
    (inputs, _), *_ = made.calibration_batches(ALIKE)
    own = make_engine(EngineName.qflow).quantize(made, requested, applied, ALIKE).outputs(inputs)
    other = make_engine(EngineName.plugin).quantize(made, requested, applied, ALIKE)
    assert other.names["[add]"] == "sum" and other.names["quant[other]"] == "quant_b" and other.findings({}) == ()
    assert other.qconfig.digest == applied.digest and other.qconfig.ops["act"].output == QDtype.float16
    assert [
        name for name, value in other.outputs(inputs).items() if (value - own[name]).norm() > 1e-2 * own[name].norm()
    ] == []


# ---- where the plugin does something else --------------------------------------------------------------------------


def test_a_trial_says_what_the_plugin_lowered_beyond_the_prediction_and_is_priced_by_it(task, plugin):
    rules = replace(load_rules("nash-m"), int8_inputs={}, fused_add_int8=False)  # of another device
    loose = Evaluator(task, rules, load_cost("nash-m"), engine=PluginEngine(), eval_batch=12)
    loose.measure_float()
    settings = TrialSettings(qconfig=QConfigSettings(template="qint16"), calibration=ALIKE)
    found = loose.run_trial(settings)
    assert loose.resolve(settings.qconfig)[1].ops["conv1"].output == QDtype.qint16
    assert found.qconfig.ops["conv1"].output == QDtype.qint8
    (said,) = [f for f in found.check.findings if f.op == "conv1" and "predicted" in f.message]
    assert said.message == "the plugin has qint8, qflow predicted qint16: the trial is priced with qint8"
    intro, _, *news = loose.engine.news()
    assert intro.startswith("horizon_plugin_pytorch 3.0.17 prepares, calibrates and evaluates trials")
    assert news[0].startswith(f"conv1 {said.message}") and loose.run_trial(settings) and loose.engine.news() == []
    assert found.cost == loose.cost(found.qconfig) != loose.cost(loose.resolve(settings.qconfig)[1])


def test_an_operator_that_the_plugin_leaves_in_float_fails_the_trial(evaluator, monkeypatch):
    from horizon_plugin_pytorch.quantization import QConfig
    from horizon_plugin_pytorch.quantization import canonicalize as module

    def left_in_float(node):
        if node.name.endswith("conv1"):
            node.module.qconfig = QConfig(weight=node.module.qconfig.weight)

    monkeypatch.setattr(module, "_drop_equal_inputs", left_in_float)
    evaluator.engine = PluginEngine()
    with pytest.raises(TrialError, match="got conv1 in float32, where qflow predicted qint8. See where model.conv1 is"):
        evaluator.run_trial(TrialSettings(calibration=ALIKE))


def test_every_call_of_the_plugin_is_in_the_log(evaluator):
    evaluator.engine = PluginEngine()
    result = evaluator.run_trial(TrialSettings(calibration=ALIKE))
    names = [call.name for call in result.calls]
    order = ["set_march", "ModuleNameQconfigSetter", "prepare", "check_qat_model", "set_fake_quantize", "model"]
    first = [names.index(name) for name in order]
    assert first == sorted(first) and names.index("get_qconfig") < first[0]
    assert names[-1] == "model" and result.calls[-1].arguments == "evaluation"
    (setter,) = [call for call in result.calls if call.name == "ModuleNameQconfigSetter"]
    assert "model.conv1: (FakeQuantize(" in setter.arguments and "MinMaxObserver" in setter.arguments
    assert tuple(from_dict(EngineCall, c) for c in json.loads(to_json(result.calls))) == result.calls


def test_what_the_plugin_raises_fails_the_trial_in_one_line(evaluator):
    settings = TrialSettings(calibration=CalibrationSettings(method="kl", batch_size=8, steps=1))
    evaluator.engine = PluginEngine()
    with pytest.raises(TrialError, match="The plugin's prepare takes what its contract says, but got MissingFact: the"):
        evaluator.run_trial(settings)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"skip": ("conv2",)}, r"engine=plugin works without quant.skip, but got quant.skip=\['conv2'\]. Leave it out"),
        ({"split_shared": ("auto",)}, "without quant.split_shared"),
        ({"fold_functional_norms": True}, "quant.fold_functional_norms=true"),
    ],
)
def test_what_the_plugin_is_not_asked_for_is_refused(changes, says, evaluator):
    for name, value in changes.items():
        setattr(evaluator, name, value)
    with pytest.raises(ConfigError, match=says):
        PluginEngine().check(evaluator, TrialSettings())
    with pytest.raises(ConfigError, match="engine=plugin does not train, but got qat.steps=5. Use qat=none"):
        PluginEngine().check(evaluator, TrialSettings(qat=QatSettings(steps=5)))


def test_without_a_plugin_the_engine_says_so_in_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "horizon_plugin_pytorch", None)
    with pytest.raises(ConfigError, match="needs horizon_plugin_pytorch, but got none installed here. Install it"):
        PluginEngine()


def test_the_check_file_is_read_with_its_decorated_names():
    text = """Each layer out qconfig:
+---+
| Module Name | Module Type | Input dtype | out dtype     | ch_axis        | observer |
|---+---|
| a.add[add]  | ConvAdd2d   | ['qint8']   | qint16        | -1             | X        |
| b(1)        | Linear      | ['qint16']  | torch.float32 | qconfig = None |          |
+---+

Weight qconfig:
| Module Name | Module Type | weight dtype | ch_axis | observer |
| b           | Linear      | qint8        | 0       | X        |"""
    found = read_check(text)
    assert (found["a.add"].output, found["b"].output, found["b"].weight) == (QDtype.qint16, None, QDtype.qint8)
    assert read_check("nothing") == {}
