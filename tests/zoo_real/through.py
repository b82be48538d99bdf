"""The way of one model through the whole library, step by step; every step is a function that asserts what holds."""

import copy
import itertools
import math
import tempfile
import time

import torch
from torch.utils._pytree import tree_map
from zoo_real.reference import by_hand
from zoo_real.registry import call

import qflow
from qflow.quant.trace.calling import named_tensors

BATCH, BATCHES = 2, 3


class Passage:
    """One model on its way: what the steps before have left."""

    def __init__(self, entry, device="cpu"):
        self.entry, self.device = entry, device
        self.model, self.inputs = entry.made()
        self.model = self.model.to(device)
        self.data = [to(device, self.inputs(BATCH)) for _ in range(BATCHES)]
        self.prepared = self.table = None
        self.seconds = {}

    def run(self, step):
        """Run one step, after those that it rests on, and keep its time."""
        for before in RESTS_ON.get(step, ()):
            if before not in self.seconds:
                self.run(before)
        begun = time.perf_counter()
        with torch.no_grad():
            STEPS[step](self)
        self.seconds[step] = time.perf_counter() - begun

    def prepare(self, model, data, setter=()):
        """The model prepared on the first batch of `data`."""
        return qflow.prepare(model, data[0], setter, cached_attrs=self.entry.cached_attrs)

    def outputs(self, model, data=None):
        """Floating outputs by name on the first batch; of a model with state, on all batches as one sequence."""
        data = data or self.data
        if not self.entry.cached_attrs:
            return floating(call(model, data[0]))
        if isinstance(model, qflow.Prepared):
            model.reset_state()
        else:
            model = copy.deepcopy(model)  # the state of a float model is what the first call finds
        return floating([call(model, frame) for frame in data])

    def error(self):
        """How far the outputs of the prepared model are from the float ones."""
        return distance(self.outputs(self.model), self.outputs(self.prepared))

    def error_of(self, names):
        """The error with the output quantizers of the named operators only."""
        with self.prepared.only(outputs={self.prepared.graph.by_name[name].quantizer for name in names}):
            return self.error()


def to(device, inputs):
    return tree_map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, inputs)


def floating(outputs):
    """The floating tensors of the outputs, by name."""
    return [(name, x.double()) for name, x in named_tensors(outputs) if x.is_floating_point()]


def distance(expected, found):
    """The largest distance of an output, relative to its norm."""
    pairs = list(zip(expected, found, strict=True))
    assert pairs
    return max(float((a - b).norm() / a.norm().clamp(min=1e-12)) for (_, a), (_, b) in pairs)


def prepare(way):
    """Quantizers off: exactly the float model. Every operator followed: the float model up to rounding."""
    way.prepared = way.prepare(way.model, way.data)
    qflow.set_fake_quantize(way.prepared, qflow.FakeQuantState.FLOAT)
    assert way.error() == 0.0
    with way.prepared.recording_order():
        assert way.error() < 1e-4
    assert way.prepared.graph.quantized


def calibrate(way):
    """Every quantizer has a scale, every operator of the data was traced, and int8 stays near the float model."""
    findings = qflow.calibrate(way.prepared, way.data)
    assert not way.prepared.uncalibrated
    unseen = {name.partition(" at ")[0] for name in way.prepared.unseen}
    assert unseen <= {f.op for f in findings} if way.entry.cached_attrs else not unseen  # a first frame may be special
    assert 0.0 < way.error() < 1.0


def check(way):
    """The model check has a row for each quantized operator and finds no error in a model that has none."""
    found = qflow.check(way.prepared)
    assert {row.op for row in found.rows} == {node.name for node in way.prepared.graph.quantized}
    assert not found.errors, [f.message for f in found.errors]
    assert all(row.op in qflow.check_text(found) for row in found.rows)


def layers(way):
    """The worst samples of the data are found, and each quantized operator has a row with finite distances."""
    with tempfile.TemporaryDirectory() as folder:
        analysis = qflow.QuantAnalysis(way.model, way.prepared, out_dir=folder)
        bad = analysis.auto_find_bad_case(way.data, topk=BATCH * BATCHES)
        assert bad.samples == BATCH * BATCHES
        analysis.run(index=max(bad.chosen) if way.entry.cached_attrs else None)  # a first frame may leave some out
        table = analysis.compare_per_layer()
    computed = {n.quantizer for n in way.prepared.graph.quantized if str(n.kind) != "constant"}
    assert computed <= {row.quantizer for row in table.rows}, [f.message for f in table.findings]
    assert all(math.isfinite(row.L1) for row in table.rows if row.L1 is not None)
    assert max(row.L1 or 0.0 for row in table.rows) > 0.0


def sensitivity(way):
    """Each quantizer of an output, of a value inside an operator and of a weight has a finite score; some matter."""
    with tempfile.TemporaryDirectory() as folder:
        analysis = qflow.QuantAnalysis(way.model, way.prepared, out_dir=folder)
        analysis.auto_find_bad_case(way.data)
        way.table = analysis.sensitivity()
    graph, outputs = way.prepared.graph, way.prepared.outputs
    rows = {name: {r.op_name for r in way.table.rows if r.sensitive_type == name} for name in ("activation", "weight")}
    owners = {n.quantizer: n.name for n in reversed(graph.quantized)}  # one row for a shared module
    assert rows["activation"] == {owners.get(name, name) for name, q in outputs.items() if q.active}
    assert len(rows["weight"]) == len(way.prepared.weights)
    assert all(math.isfinite(row.score) for row in way.table.rows)
    assert way.table.rows[0].score > 0.0


def cost(way):
    """A price above 0 with its interval, or the reason why there is none."""
    found = qflow.cost(way.prepared)
    assert 0.0 < found.low_ms <= found.latency_ms <= found.high_ms
    assert found.refusal or found.fps > 0


def mix(way):
    """The most sensitive fifth of the operators in int16: alone, those that the device takes err far less than in int8.

    All errors together would not show it: in a deep network with random weights they cancel or add up by chance.
    """
    prepared, default = way.prepared, (qflow.HighPrecisionOutput(), qflow.TemplateSetter("qint8"))
    scores = {n: s for n, s in way.table.activation_scores().items() if n in prepared.graph.by_name}
    names = sorted(scores, key=scores.get, reverse=True)[: max(1, len(scores) // 5)]
    setter = qflow.ModuleNameQconfigSetter({name: qflow.get_qconfig(out_dtype="qint16") for name in names})
    applied = qflow.configure(prepared, (setter, *default))
    refused = {row.op for row in qflow.check(prepared).rows if row.op in names and row.reason}
    wide = set(applied.names(qflow.QDtype.qint16)) & set(names)
    assert wide | refused == set(names)
    assert wide
    int16 = way.error_of(wide)
    qflow.configure(prepared, default)
    assert int16 < 0.25 * way.error_of(wide)
    qflow.configure(prepared, (setter, *default))
    assert math.isfinite(way.error())


def save(way):
    """The state dict, loaded into a model that was prepared anew, gives the same outputs, check and cost."""
    qflow.set_fake_quantize(way.prepared, qflow.FakeQuantState.VALIDATION)
    with tempfile.NamedTemporaryFile() as file:
        torch.save(way.prepared.state_dict(), file.name)
        state = torch.load(file.name, weights_only=True)
    twin = way.prepare(way.model, way.data)
    twin.load_state_dict(state)
    first, second = way.outputs(way.prepared), way.outputs(twin)
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(first, second, strict=True))
    assert qflow.check(twin).rows == qflow.check(way.prepared).rows
    assert qflow.cost(twin) == qflow.cost(way.prepared)


def by_hand_alike(way):
    """The quantizers of modules and weights compute what the reference computes, in a mix of int8 and int16."""
    before = torch.get_default_dtype()
    if way.entry.double:
        torch.set_default_dtype(torch.float64)  # for what a model creates in its forward
    try:
        expected, found, plain = both_ways(way, torch.get_default_dtype())
    finally:
        torch.set_default_dtype(before)
    seen = distance(plain, expected)
    assert seen > 1e-4  # quantization
    # in float32, sums that differ in the last bit move values to the next code, and a recurrent network adds that up
    assert distance(expected, found) < (1e-6 if way.entry.double else 0.5 * seen)


def both_ways(way, dtype):
    """Outputs of the reference, of qflow with the same quantizers on, and of the float model."""
    model = way.entry.made()[0].to(way.device, dtype)
    data = [tree_map(lambda x: x.to(dtype) if x.is_floating_point() else x, inputs) for inputs in way.data]
    places = itertools.count()

    def third(node, graph):
        return qflow.get_qconfig(out_dtype="qint16") if next(places) % 3 == 2 else None

    prepared = way.prepare(model, data, third)
    qflow.calibrate(prepared, data)
    twin, outputs, weights = by_hand(model, prepared)
    assert weights
    with prepared.only(outputs=outputs, weights=weights):
        found = way.outputs(prepared, data)
    return way.outputs(twin, data), found, way.outputs(model, data)


STEPS = {
    "prepare": prepare,
    "calibrate": calibrate,
    "check": check,
    "layers": layers,
    "sensitivity": sensitivity,
    "cost": cost,
    "mix": mix,
    "save": save,
    "by_hand": by_hand_alike,
}
RESTS_ON = {
    "calibrate": ("prepare",),
    **{step: ("prepare", "calibrate") for step in ("check", "layers", "sensitivity", "cost", "save")},
    "mix": ("prepare", "calibrate", "sensitivity"),
}
