"""Models that keep state between calls: the attributes that hold it are named, and every frame is the model's own."""

import copy

import pytest
import torch
from support.temporal import KINDS, Bank, Bev, Buffer, ConvGru, FromNone, Queue, Ring, frames, made
from torch import nn

import qflow
from qflow.core.errors import ModelError
from qflow.quant.trace.calling import named_tensors


def run(model, sequence):
    """Outputs of the frames; None resets the state."""
    with torch.no_grad():
        return [dict(named_tensors(model(*frame))) for frame in sequence if frame or model.reset_state()]


def equal(a, b):
    return all(torch.equal(x[name], y[name]) for x, y in zip(a, b, strict=True) for name in {**x, **y})


@pytest.fixture(params=KINDS, ids=lambda kind: kind.__name__)
def kind(request):
    return request.param


def prepared_of(kind, model=None):
    attrs, _ = KINDS[kind]
    return qflow.prepare(model or made(kind), frames(kind, 1)[0], cached_attrs=attrs)


def test_state_that_is_not_named_is_refused_by_name(kind):
    attrs, _ = KINDS[kind]
    with pytest.raises(ModelError, match="keeps no state between calls, but got") as error:
        qflow.prepare(made(kind), frames(kind, 1)[0])
    assert f"but got {', '.join(attrs)} changed" in str(error.value)
    line = str(error.value).partition("cached_attrs=")[2].partition(" (task.")[0]
    assert eval(line) == attrs  # the way out, as it stands in the message


def test_the_float_graph_is_the_model_bit_for_bit_over_a_sequence(kind):
    model, sequence = made(kind), frames(kind, 6)
    prepared = prepared_of(kind, model)
    assert equal(run(prepared, sequence), run(model, sequence))


def test_preparing_leaves_the_state_of_the_model_as_it_was(kind):
    model, sequence = made(kind), frames(kind, 6)
    prepared_of(kind, model)
    assert equal(run(model, sequence), run(made(kind), sequence))


def test_every_tensor_of_the_state_has_an_input_quantizer_and_none_a_high_precision_output(kind):
    prepared = prepared_of(kind)
    attrs, _ = KINDS[kind]
    inputs = [n for n in prepared.graph.nodes if n.name.startswith("quant[self.")]
    assert {n.name.partition("self.")[2].rpartition("]")[0].partition("-")[0] for n in inputs} <= set(attrs)
    assert inputs and all(n.quantizer for n in inputs)
    assert not set(prepared.graph.state) & set(prepared.graph.high_precision)
    assert all(op.output is not None for name, op in prepared.applied.ops.items() if name in prepared.graph.state)


def test_the_states_of_both_models_and_of_copies_never_mix(kind):
    model, sequence = made(kind), frames(kind, 5)
    prepared = prepared_of(kind, model)
    expected = run(made(kind), sequence)
    begun = run(prepared, sequence[:3])
    twin = copy.deepcopy(prepared)  # continues from the state of the third frame
    assert equal(run(model, sequence), expected)
    assert equal(begun + run(prepared, sequence[3:]), expected)
    assert equal(run(twin, sequence[3:]), expected[3:])


def test_reset_begins_a_sequence(kind):
    sequence = frames(kind, 5)
    prepared = prepared_of(kind)
    first = run(prepared, sequence)
    assert not equal(run(prepared, sequence), first)
    prepared.reset_state()
    assert equal(run(prepared, sequence), first)


def test_the_present_values_are_the_start_of_a_sequence():
    model = made(FromNone)
    run(model, frames(FromNone, 2))
    held = model.state.clone()
    prepared = prepared_of(FromNone, model)
    run(prepared, frames(FromNone, 2))
    prepared.reset_state()
    assert torch.equal(prepared.model.state, held)


@pytest.mark.parametrize("kind", [Buffer, Ring, ConvGru])
def test_state_dicts_hold_the_start_of_a_sequence(kind):
    prepared, sequence = prepared_of(kind), frames(kind, 4)
    qflow.calibrate(prepared, sequence)
    prepared.reset_state()
    expected = run(prepared, sequence)
    state = prepared.state_dict()  # in the middle of a sequence
    other = prepared_of(kind)
    run(other, sequence)
    other.load_state_dict(state)
    qflow.set_fake_quantize(other, qflow.FakeQuantState.VALIDATION)
    assert equal(run(other, sequence), expected)
    assert {n: t.shape for n, t in prepared.float_state_dict().items()} == {
        n: t.shape for n, t in made(kind).state_dict().items()
    }


def test_a_state_of_fixed_batch_size_is_noted():
    notes = prepared_of(Ring).graph.notes
    assert any("memory starts with a batch size of its own" in note for note in notes)


def test_what_a_call_computes_for_the_next_is_an_output_unless_it_is_returned_or_only_moved():
    assert prepared_of(FromNone).graph.outputs == (("0", "[detach]"),)
    assert dict(prepared_of(Queue).graph.outputs).keys() == {"0", "self.queue"}
    assert dict(prepared_of(ConvGru).graph.outputs).keys() == {"map", "self.hidden"}
    assert dict(prepared_of(Bev).graph.outputs).keys() == {"0", "self.prev"}


class Written(nn.Module):
    """Attributes that are written and never read by a later call, and a cache."""

    def __init__(self):
        super().__init__()
        self.lin, self.calls, self.last, self.sums = nn.Linear(4, 4), 0, None, []
        self.scale = None

    def forward(self, x):
        self.calls += 1
        if self.scale is None:
            self.scale = 2.0
        self.last = self.lin(x)
        self.sums.append(self.last.sum())
        return self.last * self.scale


def test_attributes_that_no_later_call_reads_are_no_state():
    model = Written().eval()
    prepared = qflow.prepare(model, torch.randn(2, 4))
    assert prepared.cached is None
    with pytest.raises(ModelError, match="has a state to reset"):
        prepared.reset_state()


class Toggled(Bank):
    """A flag decides whether the state is read."""

    def __init__(self):
        super().__init__()
        self.begun, self.last = False, torch.zeros(())

    def forward(self, x):
        x = self.conv(x)
        out = x + self.last if self.begun else x
        self.begun, self.last = True, x
        return out


def test_a_flag_is_state_too():
    with pytest.raises(ModelError, match="but got begun, last changed"):
        qflow.prepare(Toggled().eval(), torch.randn(2, 3, 8, 8))


@pytest.mark.parametrize(
    ("attrs", "message"),
    [
        (("stat",), "cached_attrs names attributes of the model, as head.memory, but got 'stat'"),
        (("conv",), "cached_attrs names attributes that hold state, but got the Conv2d conv"),
        (("conv.weight",), "but got the Parameter conv.weight"),
        (("note",), "cached_attrs names attributes in which a model keeps tensors, but got none in note"),
    ],
)
def test_names_are_checked(attrs, message):
    model = made(FromNone)
    model.note = "x"
    with pytest.raises(ModelError, match=message):
        qflow.prepare(model, frames(FromNone, 1)[0], cached_attrs=attrs)


class Growing(FromNone):
    def forward(self, x):
        self.state = [*(self.state or []), self.conv(x)]
        return torch.stack(self.state).mean(0)


def test_a_state_that_grows_for_ever_is_refused():
    with pytest.raises(ModelError, match=r"keeps its form after some frames, but got state still changing after 64"):
        qflow.prepare(Growing().eval(), torch.randn(2, 3, 8, 8), cached_attrs="state")


class Begun(FromNone):
    """The first frame computes its state with an operator of its own, and another one runs in float there alone."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(8, 8, 1)

    def forward(self, x):
        x = self.conv(x)
        state = self.first(x).tanh() if self.state is None else self.state
        self.state = self.mix(torch.cat([x, state], 1))
        return self.state


def test_operators_of_the_first_frame_alone_stay_float_and_are_reported_once():
    model, sequence = Begun().eval(), frames(FromNone, 4)
    prepared = qflow.prepare(model, sequence[0], cached_attrs="state")
    assert equal(run(prepared, sequence), run(model, sequence))
    findings = qflow.calibrate(prepared, sequence)
    said = [f.op for f in findings if "not while the model was traced" in f.message]
    assert sorted(name.partition(" at ")[0] for name in said) == ["[tanh]", "first"]
    with pytest.warns(UserWarning, match="2 operators ran that the example inputs did not reach") as warned:
        run(prepared, [*sequence, None, *sequence])
    assert len(warned) == 1


def test_state_with_gradients_can_be_copied():
    model, sequence = made(ConvGru), frames(ConvGru, 3)
    model(*sequence[0])  # with gradients: the hidden map is no leaf
    prepared = prepared_of(ConvGru, model)
    assert not prepared.cached.initial["hidden"].requires_grad
    assert model.hidden.requires_grad


def test_a_list_that_the_user_watches_stays_the_models():
    model = Written().eval()
    watched = model.sums
    qflow.prepare(model, torch.randn(2, 4))
    assert model.sums is watched
