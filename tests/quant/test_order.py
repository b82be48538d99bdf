"""Order-changing operators: their indices, their results in a given order, and passes that follow a recorded one."""

import pytest
import torch
from torch import nn

from qflow.core.dtype import QDtype
from qflow.core.resolve import resolve
from qflow.core.setter import HighPrecisionOutput, TemplateSetter
from qflow.core.settings import CalibrationSettings
from qflow.quant.model.calibrate import apply_scales, collect
from qflow.quant.model.prepare import prepare
from qflow.quant.trace.calling import call_model
from qflow.quant.trace.ops import function_name
from qflow.quant.trace.order import in_order, indices_of, jumps, may_change_order
from qflow.quant.trace.trace import trace

CALLS = [
    (torch.topk, (3,), {}),
    (torch.topk, (2, 0), {}),
    (torch.topk, (), {"k": 2, "dim": 1, "largest": False}),
    (torch.Tensor.topk, (3, 1), {}),
    (torch.sort, (), {}),
    (torch.sort, (0, True), {}),
    (torch.Tensor.sort, (), {"dim": 0, "stable": True}),
    (torch.argsort, (), {"dim": 1}),
    (torch.Tensor.argsort, (1,), {}),
    (torch.argmax, (), {}),
    (torch.argmax, (1,), {}),
    (torch.Tensor.argmin, (), {"dim": 0, "keepdim": True}),
    (torch.max, (1,), {}),
    (torch.max, (1, True), {}),
    (torch.Tensor.min, (), {"dim": 0}),
    (torch.min, (), {"axis": 1}),
    (torch.kthvalue, (2,), {}),
    (torch.kthvalue, (2, 0), {"keepdim": True}),
    (torch.median, (1,), {}),
    (torch.nanmedian, (), {"dim": 0}),
    (torch.mode, (), {}),
    (torch.cummax, (1,), {}),
    (torch.Tensor.cummin, (), {"dim": 0}),
]


@pytest.mark.parametrize(("function", "args", "kwargs"), CALLS)
@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 4)])
def test_an_operator_in_its_own_order_gives_its_own_result(function, args, kwargs, shape):
    torch.manual_seed(0)
    x, name = torch.randn(shape), function_name(function)
    out = function(x, *args, **kwargs)
    indices = indices_of(name, out)
    again = in_order(name, indices, (x, *args), kwargs)
    assert type(again) is type(out)
    for a, b in zip(torch.utils._pytree.tree_leaves(again), torch.utils._pytree.tree_leaves(out), strict=True):
        assert torch.equal(a, b)
    other = in_order(name, indices, (2 * x + 1, *args), kwargs)  # its own values, at the given places
    if isinstance(out, tuple):
        assert torch.equal(other[0], 2 * out[0] + 1)
        assert other.values is other[0]


def test_vectors_and_keywords_work_too():
    x = torch.tensor([3.0, 1.0, 2.0])
    assert in_order("max", torch.tensor(2), (x, 0), {}).values == 2.0
    assert in_order("sort", torch.tensor([2, 0, 1]), (), {"input": x}).values.tolist() == [2.0, 3.0, 1.0]


def test_what_changes_no_order_has_no_indices():
    x = torch.randn(3, 3)
    assert indices_of("max", torch.max(x, -x)) is None
    assert indices_of("max", x.max()) is None
    assert indices_of("split", x.split(2)) is None
    assert indices_of("softmax", x.softmax(0)) is None
    assert may_change_order({"conv", "head[topk](1)"})
    assert not may_change_order({"conv", "topk", "head[relu]"})


class Detector(nn.Module):
    """Scores, the boxes of the best ones, and their class."""

    def __init__(self):
        super().__init__()
        self.stem, self.score, self.box = nn.Linear(8, 32), nn.Linear(32, 24), nn.Linear(32, 24 * 4)

    def forward(self, x):
        x = self.stem(x).relu()
        score, box = self.score(x).sigmoid(), self.box(x).reshape(-1, 24, 4)
        best, at = score.topk(6, dim=1)
        boxes = box.gather(1, at[:, :, None].expand(-1, -1, 4))
        return {"score": best, "box": boxes, "class": score.argmax(1), "ranked": score.sort(1, True)[0]}


def calibrated(model, example):
    prepared = prepare(model, example)
    qconfig = resolve(prepared.graph, [HighPrecisionOutput(), TemplateSetter(QDtype.qint8)], "nash-m")
    apply_scales(prepared, collect(prepared, [(example, len(example))]), qconfig, CalibrationSettings(method="minmax"))
    return prepared


@pytest.fixture(scope="module")
def detector():
    torch.manual_seed(0)
    model, x = Detector().eval(), torch.randn(64, 8)
    return model, calibrated(model, x), x


def test_a_quantized_pass_follows_the_order_of_the_float_pass(detector):
    model, prepared, x = detector
    with torch.no_grad():
        reference = model(x)
        with prepared.recording_order() as order:
            assert torch.equal(call_model(prepared, x)["box"], reference["box"])  # recording is float
        with prepared.quantized():
            free = call_model(prepared, x)
            with prepared.following(order):
                led = call_model(prepared, x)
            again = call_model(prepared, x)
    assert set(order.indices) == {"[topk]", "[argmax]", "[sort]"} == order.followed
    assert order.strayed == set()
    assert torch.equal(led["class"], reference["class"])
    assert not torch.equal(free["class"], reference["class"])
    assert (led["box"] - reference["box"]).abs().max() < 0.1 < (free["box"] - reference["box"]).abs().max()
    assert all(torch.equal(free[k], again[k]) for k in free)  # and leaving restores


def test_recording_inside_a_quantized_block_is_float_and_restores(detector):
    model, prepared, x = detector
    with torch.no_grad(), prepared.quantized():
        before = call_model(prepared, x)["ranked"]
        with prepared.recording_order():
            assert torch.equal(call_model(prepared, x)["ranked"], model(x)["ranked"])
        assert torch.equal(call_model(prepared, x)["ranked"], before)


def test_a_call_on_other_shapes_keeps_its_own_order(detector):
    _, prepared, x = detector
    with torch.no_grad(), prepared.quantized():
        with prepared.recording_order() as order:
            call_model(prepared, x)
        free = call_model(prepared, x[:5])
        with prepared.following(order):
            led = call_model(prepared, x[:5])
    assert order.strayed == {"[topk]", "[argmax]", "[sort]"}
    assert torch.equal(free["box"], led["box"])


def test_the_users_code_may_write_into_what_it_gets():
    class Shifts(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(4, 6)

        def forward(self, x):
            values, at = self.lin(x).max(1)
            at += 1
            return values, at

    model, x = Shifts().eval(), torch.randn(3, 4)
    prepared = calibrated(model, x)
    with torch.no_grad(), prepared.recording_order() as order:
        first = prepared(x)[1]
        with prepared.quantized(), prepared.following(order):
            assert torch.equal(prepared(x)[1], first)
            assert torch.equal(prepared(x)[1], first)


class Ends(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        early = self.a(x).round()
        y = self.b(early)
        return y, y * (y > 0.5), self.a(x).relu(), y.long(), y.sort(1)[0]


def test_jumps_before_an_output_are_named_and_those_before_a_gemm_are_not():
    found = {(j.output, j.op_type) for j in jumps(trace(Ends().eval(), torch.randn(2, 4)))}
    assert found == {("1", "torch.gt"), ("3", "torch.long")}


def test_a_selection_of_rows_is_named_wherever_it_stands():
    class TwoStage(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            y = self.a(x)
            return self.b(torch.masked_select(y, y > 0)[:4][None])

    assert [j.op_type for j in jumps(trace(TwoStage().eval(), torch.randn(8, 4)))] == ["torch.masked_select"]


def test_arithmetic_on_indices_is_no_jump_and_a_threshold_on_scores_is_one():
    class Peaks(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(4, 12)

        def forward(self, x):
            score, at = self.a(x).topk(3)
            return score, (at // 4).float(), (at % 4).float(), score * (score > 0.3)

    found = [(j.output, j.op_type) for j in jumps(trace(Peaks().eval(), torch.randn(2, 4)))]
    assert found == [("3", "torch.gt")]
