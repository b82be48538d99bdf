"""The pitfalls of the engine's reference (section 7) by number, so that none comes back.

Most are cured where a test of its own file already looks; those are listed. P5, P7 (torchao's annotations) and P17
(FX) belong to engines that were not chosen; P19 and P20 are imports, which the packaging test refuses.
"""

import io
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from support.models import Shared, revive
from torch import nn

import qflow
from qflow.quant.model.prepare import prepare

HERE = Path(__file__).parent
ELSEWHERE = {
    "P1 a shared norm is not folded": "test_tape.py::test_what_is_not_fused_says_why",
    "P2 P3 eps, momentum, dropout": "test_batch_norm.py::test_the_users_own_eps_momentum_and_dropout_are_respected",
    "P6 dead channels": "test_batch_norm.py::test_a_dead_channel_trains_and_gives_no_nan",
    "P8 checkpointing": "test_qat_models.py::test_activation_checkpointing_changes_no_gradient",
    "P10 pickling": "test_state.py::test_a_pickled_model_computes_the_same_in_another_process",
    "P11 dynamo": "test_state.py::test_a_compiled_model_computes_the_same",
    "P12 weight cache": "test_qat_models.py::test_a_weight_that_changes_is_quantized_anew",
    "P13 scale of a shared module": "test_qat_models.py::test_a_shared_convolution_trains",
    "P14 in-place operators": "test_qat_models.py::test_in_place_operators_train_as_their_out_of_place_forms",
    "P15 one quantizer a fused group": "test_fusion.py::test_all_patterns_with_their_names",
    "P16 fused attention": "test_hard_models.py::test_attention_is_written_out_in_operators_with_weights_of_their_own",
    "P18 data-dependent sites": "test_tape.py::test_a_python_value_taken_from_data_is_noted_with_its_line",
    "P21 writes through views": "test_writes.py::test_nothing_that_is_written_through_a_view_is_declared_dead",
    "P24 vacuous tests": "test_prepare.py::test_every_planned_quantizer_runs_and_int16_is_closer_than_int8",
}


@pytest.mark.parametrize("pitfall", ELSEWHERE)
def test_the_cure_is_tested_elsewhere(pitfall):
    file, _, name = ELSEWHERE[pitfall].partition("::")
    assert f"def {name}(" in (HERE / file).read_text()


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.heads, self.out = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=True), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.heads(x, x, x, need_weights=False)[0])


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        return self.out(F.scaled_dot_product_attention(x, x, x, dropout_p=0.5 if self.training else 0.0))


@pytest.mark.parametrize("kind", [Heads, Plain])
def test_p4_attention_drops_out_in_train_mode_alone(kind):
    model, x = kind().eval(), torch.randn(2, 64, 8)
    prepared = prepare(model, x)
    runs = {}
    for training in (True, False, True):
        prepared.train(training)
        with torch.no_grad():
            runs[training] = [prepared.observed(x) for _ in range(2)]
    assert torch.equal(*runs[False])
    assert torch.allclose(runs[False][0], model(x), atol=1e-6)
    assert not torch.equal(*runs[True])
    model.train(), prepared.train()
    with torch.no_grad():
        dropped = torch.stack([prepared.observed(x) for _ in range(300)]).std(0).mean()
        expected = torch.stack([model(x) for _ in range(300)]).std(0).mean()
    assert float(dropped / expected) == pytest.approx(1.0, abs=0.1)


class Containers(nn.Module):
    def __init__(self):
        super().__init__()
        self.by_name = nn.ModuleDict({"a": nn.Conv2d(3, 3, 1), "b": nn.SiLU()})
        self.in_order = nn.ModuleList([nn.Conv2d(3, 3, 1), nn.ReLU()])

    def forward(self, x):
        for layer in (*self.by_name.values(), *self.in_order):
            x = layer(x)
        return x


@pytest.mark.parametrize("model", [Containers(), nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 2, 1))])
def test_p9_the_users_containers_hold_what_they_held(model):
    prepared = prepare(model.eval(), torch.randn(2, 3, 4, 4))
    assert list(dict(prepared.model.named_modules())) == list(dict(model.named_modules()))
    assert list(prepared.model.state_dict()) == list(model.state_dict())


def calibrated(model, x):
    prepared = qflow.prepare(model, x)
    qflow.calibrate(prepared, [x])
    return prepared


def test_p22_a_shared_weight_is_quantized_at_all_its_calls():
    model, x = revive(Shared()), torch.randn(2, 4, 8, 8)
    prepared = calibrated(model, x)
    with torch.no_grad():
        with prepared.only(weights=["conv"]):
            got = prepared(x)
        quantizer = prepared.weights["conv"]
        quantizer.enabled = True
        model.conv.weight.copy_(quantizer(model.conv.weight))
        assert torch.equal(got, model(x))


class Dead(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return torch.relu(self.conv(x) - 100.0) * 2.0 + x


def test_p23_what_was_always_zero_stays_unquantized_after_save_and_load():
    model, x = Dead().eval(), torch.randn(2, 3, 4, 4)
    prepared, held = calibrated(model, x), io.BytesIO()
    torch.save(prepared.state_dict(), held)
    held.seek(0)
    loaded = qflow.prepare(model, x)
    loaded.load_state_dict(torch.load(held, weights_only=True))
    loud = x * 1000.0  # now the ReLU lets values through
    for each in (prepared, loaded):
        with torch.no_grad(), each.only(outputs=["[relu]", "[mul]"]):
            seen = {}
            each.watch = lambda name, value, seen=seen: seen.setdefault(name, value)
            each(loud)
        assert float(seen["[mul]"].max()) > 10.0  # a scale of nearly zero would have clipped it away
        assert not each.outputs["[relu]"].active
