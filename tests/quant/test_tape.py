import pytest
import torch
from support.models import Shared, zoo
from torch import nn

from qflow.quant.model.plan import make_plan
from qflow.quant.trace.calling import input_tensors, named_tensors
from qflow.quant.trace.trace import trace


def graph_of(name):
    model, example = zoo()[name]
    return make_plan(trace(model, example), model).graph


def test_names_are_the_users():
    graph = graph_of("resnet")
    assert [n.name for n in graph.nodes[:3]] == ["quant[x]", "stem.0", "blocks.0.conv1"]
    assert "blocks.1[add]" in graph.by_name
    assert graph.by_name["blocks.1[add]"].weight == "blocks.1.conv2"
    assert graph.outputs == (("0", "head"),)


def test_the_second_call_of_a_module_is_numbered_and_counted():
    graph = graph_of("shared")
    assert [n.name for n in graph.nodes] == ["quant[x]", "conv", "bn", "conv(1)", "bn(1)", "[mul]"]
    assert graph.calls == {"conv": 2, "bn": 2, "never": 0}
    assert {n.quantizer for n in graph.nodes if n.name.startswith("conv")} == {"conv"}
    assert [n.name for n in graph.quantized] == ["quant[x]", "conv", "bn", "[mul]"]


def test_functionals_go_by_scope_and_function():
    names = [n.name for n in graph_of("attention").nodes]
    assert "[matmul]" in names
    assert "[matmul](1)" in names
    assert "[softmax]" in names
    assert names.index("[add]") < names.index("norm")


def test_inputs_and_outputs_carry_the_names_of_arguments_and_positions():
    model, example = zoo()["two_inputs"]
    assert [n for n, _ in input_tensors(model, example)] == ["image", "points"]
    assert [n for n, _ in named_tensors(model(**example))] == ["0", "1-0", "1-1"]
    assert [name for name, _ in graph_of("unet").outputs] == ["map", "score"]


def test_a_python_value_taken_from_data_is_noted_with_its_line():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 4)

        def forward(self, x):
            if x.sum() > 0:
                x = x * 2
            return self.lin(x)

    notes = trace(Branch().eval(), torch.ones(2, 4)).notes
    assert any("taken from a tensor by bool at test_tape.py:" in note for note in notes)


def test_a_constant_is_a_producer_with_a_quantizer():
    graph = graph_of("attention")
    assert graph.by_name["[add]"].inputs == ("quant[x]", "const[position]")
    assert graph.by_name["const[position]"].quantizer == "const[position]"


def test_tracing_leaves_the_model_as_it_was():
    model = Shared().eval()
    before = len(model.conv._forward_hooks)
    trace(model, torch.rand(1, 4, 4, 4))
    assert len(model.conv._forward_hooks) == before
    assert type(model.conv) is nn.Conv2d
    with pytest.raises(RuntimeError):
        trace(model, torch.rand(1, 3, 4, 4))
    assert len(model.conv._forward_hooks) == before


def test_fusion_follows_the_plugin():
    resnet, unet = graph_of("resnet"), graph_of("unet")
    assert resnet.by_name["stem.0"].fused_types == ("BN", "ReLU6")
    assert resnet.by_name["blocks.0.conv1"].fused_types == ("BN", "ReLU")
    assert resnet.by_name["blocks.0[add]"].fused_types == ("BN", "Add", "ReLU")
    assert unet.by_name["down.0"].fused_types == ("BN",)  # SiLU is a table look-up, not fused
    assert unet.by_name["up"].fused_types == ("BN", "ReLU")


def test_what_is_not_fused_says_why():
    assert ("conv", "bn", "conv is a shared module") in graph_of("shared").unfused

    class Forked(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            y = self.conv(x)
            return self.bn(y) + y

    model = Forked().eval()
    graph = make_plan(trace(model, torch.rand(1, 3, 4, 4)), model).graph
    assert ("conv", "bn", "conv has several consumers") in graph.unfused


def test_of_two_convs_the_later_one_takes_the_add():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

        def forward(self, x):
            return self.a(x) + self.b(x)

    model = Two().eval()
    graph = make_plan(trace(model, torch.rand(1, 3, 4, 4)), model).graph
    assert graph.by_name["[add]"].weight == "b"
    assert graph.by_name["a"].fused == ()


def test_high_precision_output_is_for_gemms_that_only_leave():
    assert graph_of("resnet").high_precision == ("head",)
    assert graph_of("unet").high_precision == ()  # out feeds interpolate and sigmoid


class OnlyInTraining(nn.Module):
    """Modules that eval mode does not call: what passes values on would need no quantizer, an activation would."""

    def __init__(self):
        super().__init__()
        self.body, self.attention = nn.Linear(4, 4), nn.MultiheadAttention(4, 2, dropout=0.1, batch_first=True)
        self.drop, self.kept, self.flat, self.pool = nn.Dropout(), nn.Identity(), nn.Flatten(), nn.MaxPool1d(2)
        self.relu = nn.ReLU()

    def forward(self, x):
        x = self.body(x)
        return self.attention(x, x, x)[0] if not self.training else self.relu(self.kept(self.drop(x)))


def test_a_module_that_only_passes_values_on_is_not_missed_where_it_is_not_called():
    model = OnlyInTraining().eval()
    graph = make_plan(trace(model, torch.randn(2, 3, 4)), model).graph
    assert graph.calls == {"body": 1, "attention.out_proj": 1, "relu": 0}
