"""Bad cases by sequence and frame; layers and sensitivity from the state as it was, as loops by hand find them."""

import copy

import pytest
import torch
from support.temporal import KINDS, Buffer, ConvGru, FromNone, Queue, Ring, frames, made

import qflow
from qflow.core.errors import ConfigError, DataError
from qflow.quant.trace.calling import named_tensors

LENGTHS = (4, 6, 5)


def one_by_one(kind, lengths=LENGTHS):
    """Sequences of single samples (batch 1)."""
    return [[tuple(t[:1] for t in f) for f in frames(kind, n, seed)] for seed, n in enumerate(lengths)]


@pytest.fixture(params=[kind for kind in KINDS if kind is not Ring], ids=lambda kind: kind.__name__)
def kind(request):
    return request.param


@pytest.fixture
def analysis(kind, tmp_path):
    attrs, _ = KINDS[kind]
    model, sequences = made(kind), one_by_one(kind)
    prepared = qflow.prepare(model, frames(kind, 1)[0], cached_attrs=attrs)
    items = [frame for sequence in sequences for frame in sequence]
    qflow.calibrate(prepared, items, sequences=LENGTHS)
    return qflow.QuantAnalysis(model, prepared, out_dir=tmp_path), items, sequences


def attribute(model, path, *value):
    *places, name = path.split(".")
    for place in places:
        model = getattr(model, place)
    if value:
        setattr(model, name, copy.deepcopy(value[0]))
    return getattr(model, name)


def named(outputs):
    return dict(named_tensors(outputs))


def walk(kind, qa, sequences):
    """(sequence, frame, float model before the frame, inputs) of every frame."""
    for s, sequence in enumerate(sequences):
        model = made(kind)
        with torch.no_grad():
            for f, inputs in enumerate(sequence):
                yield s, f, copy.deepcopy(model), inputs
                model(*inputs)


def quantized(kind, prepared, model, inputs):
    """Outputs of the prepared model from the state of the float model."""
    for path in KINDS[kind][0]:
        attribute(prepared.model, path, attribute(model, path))
    with torch.no_grad():
        return named(prepared(*inputs))


def test_bad_cases_are_found_by_sequence_and_frame(kind, analysis):
    qa, items, sequences = analysis
    table = qa.auto_find_bad_case(items, sequences=LENGTHS, cached_attrs=KINDS[kind][0], compare="raw")
    distances = {}
    for s, f, model, inputs in walk(kind, qa, sequences):
        got = quantized(kind, qa.pair.prepared, copy.deepcopy(model), inputs)
        with torch.no_grad():
            for name, y in named(model(*inputs)).items():
                distances.setdefault(name, {})[s, f] = float((y - got[name]).abs().mean())
    for name, found in distances.items():
        worst = max(found, key=found.get)
        assert table.frame(table.index[name]["L1"]) == worst
        assert table.value[name]["L1"] == pytest.approx(found[worst], rel=1e-5)
    frame = qflow.to_frame(table)
    assert [*frame.columns] == ["output", "metric", "rank", "sample", "sequence", "frame", "value"]
    assert table.shown(LENGTHS[0] + 2) == "1:2"
    text = (qa.out_dir / "badcase.txt").read_text()
    assert "sequence:frame" in text and table.shown(table.chosen[0]) in text


def test_sensitivity_runs_from_the_state_as_it_was(kind, analysis):
    qa, items, sequences = analysis
    table = qa.auto_find_bad_case(items, sequences=LENGTHS)
    chosen = table.frame(table.chosen[0])
    model, inputs = next((m, x) for s, f, m, x in walk(kind, qa, sequences) if (s, f) == chosen)
    case = qa._case(None)
    qa.set_bad_case(case.inputs, case.state)
    rows = qa.sensitivity().rows
    with torch.no_grad():
        expected = named(copy.deepcopy(model)(*inputs))
    prepared = qa.pair.prepared
    assert {row.op_name for row in rows} >= {
        n.name for n in prepared.graph.quantized if n.name.startswith("quant[self.")
    }
    for row in rows:
        switch = {"weights" if row.sensitive_type == "weight" else "outputs": [_quantizer(prepared, row)]}
        with prepared.only(**switch):
            got = quantized(kind, prepared, copy.deepcopy(model), inputs)
        for name, value in row.outputs:
            if name in expected:
                assert value == pytest.approx(float((expected[name] - got[name]).abs().mean()), rel=1e-3, abs=1e-7)


def _quantizer(prepared, row):
    node = prepared.graph.by_name[row.op_name]
    return node.weight if row.sensitive_type == "weight" else node.quantizer


def test_layers_are_compared_from_the_state_as_it_was(kind, analysis):
    qa, items, sequences = analysis
    table = qa.auto_find_bad_case(items, sequences=LENGTHS)
    chosen = table.frame(table.chosen[0])
    model, inputs = next((m, x) for s, f, m, x in walk(kind, qa, sequences) if (s, f) == chosen)
    rows = {row.mod_name: row for row in qa.run().rows}
    values = {}
    prepared = qa.pair.prepared
    for key, switched in (("float", False), ("int8", True)):
        prepared.watch = lambda name, value, key=key: values.setdefault(key, {}).setdefault(name, value.clone())
        state = qflow.FakeQuantState.VALIDATION if switched else qflow.FakeQuantState.FLOAT
        qflow.set_fake_quantize(prepared, state)
        for path in KINDS[kind][0]:
            attribute(prepared.model, path, attribute(model, path))
        with torch.no_grad():
            prepared.observed(*inputs)
    prepared.watch = None
    compared = 0
    for name, plain in values["float"].items():
        row = rows.get(name)
        if row is None or row.L1 is None or not plain.is_floating_point():
            continue
        value = values["int8"][name]
        quantizer = prepared.outputs.get(prepared.plan.output_at.get(name, ""))
        value = value if quantizer is None else quantizer(value)
        wanted = float((plain - value).abs().mean())
        assert abs(row.L1 - wanted) <= 1e-4 * wanted + 1e-7, name
        compared += 1
    assert compared >= len(prepared.plan.output_at.keys() & values["float"].keys()) > 3


def test_a_saved_bad_case_keeps_its_state(kind, analysis, tmp_path):
    qa, items, _ = analysis
    qa.auto_find_bad_case(items, sequences=LENGTHS, topk=2)
    first = qa.sensitivity(), qa.run()
    again = qflow.QuantAnalysis(qa.pair.model, qa.pair.prepared, out_dir=tmp_path)
    again.load_bad_case()
    assert (again.sensitivity(), again.run()) == first


def test_the_analysis_leaves_both_states_as_they_were(kind, analysis):
    qa, items, sequences = analysis
    model, prepared = qa.pair.model, qa.pair.prepared
    plain = made(kind)
    with torch.no_grad():
        for inputs in sequences[0][:2]:
            plain(*inputs), model(*inputs), prepared(*inputs)
    twin = copy.deepcopy(prepared)
    qa.auto_find_bad_case(items, sequences=LENGTHS)
    qa.run(), qa.sensitivity(), qa.advise()
    with torch.no_grad():
        for inputs in sequences[0][2:]:
            for a, b in ((plain, model), (twin, prepared)):
                one, other = named(a(*inputs)), named(b(*inputs))
                assert all(torch.equal(one[n], other[n]) for n in one)


def test_operators_that_only_write_the_state_are_sensitive_too(tmp_path):
    model, sequences = made(Queue), one_by_one(Queue)
    prepared = qflow.prepare(model, frames(Queue, 1)[0], cached_attrs="queue")
    qflow.calibrate(prepared, sequences[1])
    qa = qflow.QuantAnalysis(model, prepared, out_dir=tmp_path)
    qa.auto_find_bad_case(sequences[1])
    scores = {(r.op_name, r.sensitive_type): r for r in qa.sensitivity().rows}
    assert dict(scores["keep", "weight"].outputs)["self.queue"] > 0 and scores["keep", "weight"].score > 0
    only = {(r.op_name, r.sensitive_type) for r in qa.sensitivity(output_names=["0"]).rows}
    assert ("keep", "weight") not in only and ("mix", "weight") in only


def test_parallel_sequences_are_searched_sample_by_sample(tmp_path):
    model = made(ConvGru)
    prepared = qflow.prepare(model, frames(ConvGru, 1)[0], cached_attrs="hidden")
    items = frames(ConvGru, 4) + frames(ConvGru, 3, seed=1)
    qflow.calibrate(prepared, items, sequences=[4, 3])
    qa = qflow.QuantAnalysis(model, prepared, out_dir=tmp_path)
    table = qa.auto_find_bad_case(items, sequences=[4, 3])
    assert table.sequences == ((4, 2), (3, 2)) and table.samples == 14
    assert [table.frame(i) for i in (0, 1, 2, 7, 8, 13)] == [(0, 0), (1, 0), (0, 1), (1, 3), (2, 0), (3, 2)]
    alone = qflow.QuantAnalysis(model, prepared, out_dir=tmp_path)
    one = [tuple(t[k : k + 1] for t in f) for part in (items[:4], items[4:]) for k in range(2) for f in part]
    other = alone.auto_find_bad_case(one, sequences=[4, 4, 3, 3])
    assert other.frame(other.chosen[0]) == table.frame(table.chosen[0])


def test_a_state_that_cannot_be_cut_into_samples_is_refused(tmp_path):
    model = made(Ring)
    prepared = qflow.prepare(model, frames(Ring, 1)[0], cached_attrs=KINDS[Ring][0])
    qflow.calibrate(prepared, frames(Ring, 6))
    qa = qflow.QuantAnalysis(model, prepared, out_dir=tmp_path)
    with pytest.raises(DataError, match=r"a state whose first axis does not hold the 2 samples.*Give items of one"):
        qa.auto_find_bad_case(frames(Ring, 6))
    qa.set_bad_case(frames(Ring, 6)[5], {"memory": torch.ones(3, 2, 4), "place": 2})
    assert qa.run().rows and qa.sensitivity().rows


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda qa, x: qa.auto_find_bad_case(x, cached_attrs=["memory"]),
            r"prepared with, \['state'\], but got \['mem",
        ),
        (lambda qa, x: qa.set_bad_case(x[0], {"memory": 1}), r"a dict with state, but got \['memory'\]"),
        (lambda qa, x: qa.set_bad_case(x[0], {"state": 1}, {"state": 2}), r"from one state, but got two that differ"),
        (lambda qa, x: qa.set_bad_case(x[0], torch.ones(2)), r"a dict with state, but got Tensor"),
    ],
)
def test_other_states_are_refused(call, message, tmp_path):
    model = made(FromNone)
    prepared = qflow.prepare(model, frames(FromNone, 1)[0], cached_attrs="state")
    qflow.calibrate(prepared, frames(FromNone, 3))
    with pytest.raises(ConfigError, match=message):
        call(qflow.QuantAnalysis(model, prepared, out_dir=tmp_path), frames(FromNone, 2))


def test_a_model_without_state_takes_none(tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3)).eval()
    x = torch.randn(2, 3, 8, 8)
    prepared = qflow.prepare(model, x)
    qflow.calibrate(prepared, [x])
    qa = qflow.QuantAnalysis(model, prepared, out_dir=tmp_path)
    with pytest.raises(ConfigError, match="sequences are for a model with state"):
        qa.auto_find_bad_case([x], sequences=[1])


def test_a_skipped_module_with_state_is_measured_by_full_forward_passes(tmp_path):
    model, items = made(Buffer), frames(Buffer, 5)
    prepared = qflow.prepare(model, items[0], skip="memory", cached_attrs="memory.seen")
    qflow.calibrate(prepared, items)
    qa = qflow.QuantAnalysis(model, prepared, out_dir=tmp_path)
    table = qa.auto_find_bad_case(items)
    case = qa._case(None)
    qa.set_bad_case(case.inputs, case.state)  # that one alone
    ranked = qa.sensitivity()
    assert "full forwards" in ranked.method
    assert any("a skipped module keeps the state memory.seen" in f.message for f in ranked.findings)
    (row,) = [r for r in ranked.rows if (r.op_name, r.sensitive_type) == ("conv", "weight")]
    s, f = table.frame(table.chosen[0])
    plain = made(Buffer)
    with torch.no_grad(), prepared.only(weights=["conv"]):
        for (x,) in items[:f]:
            plain(x[s : s + 1])
        prepared.model.memory.seen = plain.memory.seen.clone()
        x = items[f][0][s : s + 1]
        wanted = float((plain(x) - prepared(x)).abs().mean())
    assert dict(row.outputs)["0"] == pytest.approx(wanted, rel=1e-3)
