"""Ordinary code that trips a tracer: each once gave wrong numbers, or none, without a word."""

import pytest
import torch
import torch.nn.functional as F
from support.models import revive
from torch import nn

from qflow.analysis.badcases.find import find_badcases
from qflow.analysis.sensitivity.measure import sensitivity
from qflow.core.dtype import QDtype
from qflow.core.errors import ModelError
from qflow.core.resolve import resolve
from qflow.core.setter import HighPrecisionOutput, TemplateSetter
from qflow.core.settings import CalibrationSettings
from qflow.quant.model.calibrate import apply_scales, collect
from qflow.quant.model.prepare import prepare
from qflow.quant.trace.calling import call_model, named_tensors


def calibrated(model, example, dtype=QDtype.qint8):
    prepared = prepare(model, example)
    qconfig = resolve(prepared.graph, [HighPrecisionOutput(), TemplateSetter(dtype)], "nash-m")
    apply_scales(prepared, collect(prepared, [(example, 2)]), qconfig, CalibrationSettings(method="minmax"))
    return prepared


def error(model, prepared, example):
    with torch.no_grad(), prepared.quantized():
        pairs = zip(
            named_tensors(call_model(model, example)), named_tensors(call_model(prepared, example)), strict=True
        )
        return max(float((a - b).norm() / a.norm()) for (_, a), (_, b) in pairs)


class Norm1d(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin, self.bn = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x):
        return self.bn(self.lin(x))


def test_a_batch_norm_is_folded_along_the_axis_it_norms():
    torch.manual_seed(0)
    model = Norm1d().eval()
    model.bn.running_mean.normal_()
    model.bn.running_var.uniform_(0.2, 3.0)
    flat, deep = torch.randn(2, 8), torch.randn(2, 8, 8)
    assert error(model, calibrated(model, flat), flat) < 0.05
    prepared = calibrated(model, deep)
    assert error(model, prepared, deep) < 0.05
    assert any("batch norm over dim 1" in why for *_, why in prepared.graph.unfused)


def test_a_model_that_writes_into_its_input_is_compared_on_the_same_input():
    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x):
            x -= 3
            x *= 2
            return self.lin(x)

    torch.manual_seed(0)
    model, example = InPlace().eval(), torch.randn(2, 4)
    kept = example.clone()
    prepared = calibrated(model, example)
    table = find_badcases(model, prepared, [(example, 2)], count=1)
    ranked = sensitivity(model, prepared, [example])
    assert torch.equal(example, kept)
    assert max(v["L1"] for v in table.value.values()) < 0.2
    assert ranked.rows[0].score < 0.1


def test_outputs_of_a_list_of_dicts_keep_apart():
    class Levels(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1)

        def forward(self, x):
            return [{"box": self.a(x)}, {"box": self.b(x) + 50}]

    model, example = Levels().eval(), torch.randn(2, 3, 4, 4)
    prepared = calibrated(model, example)
    table = find_badcases(model, prepared, [(example, 2)], count=1)
    assert set(table.value) == {"0-box", "1-box"}
    assert all(v["L1"] < 1 for v in table.value.values())
    scores = {(r.op_name, r.sensitive_type): r.score for r in sensitivity(model, prepared, [example]).rows}
    assert scores["a", "weight"] > 0


def test_integer_and_unused_inputs_are_no_operators():
    class Embeds(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.lin = nn.Embedding(10, 6), nn.Linear(6, 3)

        def forward(self, ids, mask):
            return self.lin(self.table(ids))

    model = Embeds().eval()
    example = {"ids": torch.randint(0, 10, (2, 5)), "mask": torch.ones(2, 5)}
    prepared = calibrated(model, example)
    assert error(model, prepared, example) < 0.05
    assert not prepared.unseen
    assert any("quant[mask]" in note for note in prepared.graph.notes)


def test_a_head_that_is_computed_and_dropped_stays_float_and_is_noted():
    class Aux(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.aux = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x):
            y = self.aux(x)
            return self.main(x) if y is not None else y

    model, example = Aux().eval(), torch.randn(2, 3, 4, 4)
    prepared = calibrated(model, example)
    assert error(model, prepared, example) < 0.05
    assert any(note.startswith("aux: computed, but no output depends on it") for note in prepared.graph.notes)


def test_a_convolution_that_is_written_into_a_slice_is_quantized():
    class Slice(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 2, 1)

        def forward(self, x):
            y = self.a(x) * 1.0
            y[:, :2] = self.b(x)
            return y * 2.0

    model, example = Slice().eval(), torch.randn(2, 3, 4, 4)
    prepared = calibrated(model, example)
    assert "b" in prepared.weights
    assert error(model, prepared, example) < 0.05
    with torch.no_grad(), prepared.quantized():
        prepared(example)
        assert {"a", "b"} <= prepared.ran
        assert not prepared.unseen


def test_attention_is_written_out_in_operators_with_weights_of_their_own():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 1).eval()
    example = torch.randn(2, 5, 16)
    prepared = calibrated(model, example)
    assert error(model, prepared, example) < 0.1
    kinds = {n.name: str(n.kind) for n in prepared.graph.nodes if n.name.startswith("layers.0.self_attn")}
    assert list(kinds.values()).count("matmul") == 2
    assert list(kinds.values()).count("linear") == 2
    assert "layers.0.self_attn.in_proj_weight" in prepared.weights
    assert prepared.graph.calls["layers.0.self_attn.out_proj"] == 1
    assert not any("not known" in note for note in prepared.graph.notes)


def test_keyword_calls_of_leaf_modules():
    class Keyword(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.bn(input=self.conv(input=x)) * 1.0

    model, example = revive(Keyword()), torch.randn(2, 3, 4, 4)
    assert error(model, calibrated(model, example), example) < 0.05


def test_constants_made_like_a_tensor_and_casts_are_no_operators():
    class Like(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x):
            y = self.lin(x.float()) + torch.zeros_like(x)
            return y.mT.type(torch.float32).mT * 1.0

    model, example = Like().eval(), torch.randn(2, 4, 4)
    graph = prepare(model, example).graph
    assert [n.name for n in graph.quantized] == ["quant[x]", "lin", "[add]", "[mul]"]
    assert not any("Python value" in note for note in graph.notes)


def test_a_scale_is_not_looked_up_through_an_index_or_a_like():
    class Like(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 4, 1)

        def forward(self, x):
            a, b = self.a(x), self.b(x)
            return F.interpolate(a.view_as(b), scale_factor=2.0) + F.interpolate(b * 1.0, scale_factor=2.0)

    graph = prepare(Like().eval(), torch.randn(2, 3, 4, 4)).graph
    assert graph.sources("[interpolate]") == ("a",)


def test_what_cannot_be_right_is_refused():
    class Stateful(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 4)
            self.register_buffer("seen", torch.zeros(1))

        def forward(self, x):
            self.seen += 1
            return self.lin(x) + self.seen

    class FixedBatch(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x):
            return self.lin(x).view(2, 2, 2)

    with pytest.raises(ModelError, match="keeps no state between calls, but got seen"):
        prepare(Stateful().eval(), torch.randn(2, 4))
    with pytest.raises(ModelError, match="must run at any batch size"):
        prepare(FixedBatch().eval(), torch.randn(2, 4))
    with pytest.raises(ModelError, match=r"Wrap it in nn.Sequential"):
        prepare(nn.Linear(4, 4).eval(), torch.randn(2, 4))


def test_two_classes_of_one_name_keep_apart():
    def make(factor):
        class Scaled(nn.ReLU):
            pass

        class Net(nn.Module):
            def __init__(self):
                super().__init__()
                self.lin, self.act = nn.Linear(4, 4), Scaled()

            def forward(self, x):
                return self.act(self.lin(x)) * factor

        return Net().eval()

    for factor in (1.0, 2.0):
        prepare(make(factor), torch.randn(2, 4))


def test_a_boolean_mask_is_named_with_its_line_and_what_is_unknown_keeps_its_parameters():
    class Select(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 2)

        def forward(self, x):
            return self.lin(x[x.sum(1) > 0])

    class Recurrent(nn.Module):
        def __init__(self):
            super().__init__()
            self.cell, self.out = nn.LSTM(4, 8, batch_first=True), nn.Linear(8, 2)

        def forward(self, x):
            return self.out(self.cell(x)[0])

    torch.manual_seed(0)
    notes = prepare(Select().eval(), torch.randn(4, 4)).graph.notes
    assert any("boolean mask gives a size that depends on the data at test_hard_models.py:" in n for n in notes)
    graph = prepare(Recurrent().eval(), torch.randn(2, 5, 4)).graph
    assert [n.name for n in graph.nodes] == ["quant[x]", "cell[lstm]", "out"]
    with pytest.raises(ModelError, match="got TorchScript at 0. Give the original module"):
        prepare(nn.Sequential(torch.jit.script(nn.Linear(4, 4))).eval(), torch.randn(2, 4))
