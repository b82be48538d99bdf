"""What users do to their modules: leaves called or hooked, functions replaced, errors raised. Works, or one line."""

import copy
import functools
import threading
from collections import OrderedDict, namedtuple
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import qflow
from qflow.core.errors import ConfigError, ModelError
from qflow.core.settings import QatSettings
from qflow.quant.train.qat import train

X = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


class Conv(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3)


class Keys(Conv):
    def forward(self, img, target=None):
        return self.a(img) if target is None else self.a(img) - target


class Direct(Conv):
    def forward(self, x):
        return F.relu(self.a.forward(x))


class Scaled(Conv):
    def __init__(self):
        super().__init__()
        self.gain = nn.Parameter(torch.rand(8, 1, 1) * 5)
        self.a.register_forward_hook(lambda module, args, out: out * 3)

    def forward(self, x):
        return F.silu(self.a(x) * self.gain)


@pytest.mark.parametrize("kind", [Direct, Scaled])
def test_a_leaf_called_directly_or_hooked_is_one_operator(kind):
    model = kind().eval()
    prepared = qflow.prepare(model, X)
    qflow.calibrate(prepared, [X])
    assert "a" in prepared.weights
    with torch.no_grad(), prepared.quantized():
        error = float((prepared(X) - model(X)).norm() / model(X).norm())
        assert {q.name for q in prepared._keys().values() if q.active} == prepared.ran
    assert error < 0.05
    if kind is Scaled:
        assert [n for n in prepared.outputs if "mul" in n] == ["[mul]", "[mul](1)"]
    assert all("forward" not in vars(module) for module in model.modules())


class Remembering(nn.Module):
    def __init__(self):
        super().__init__()
        self.b, self.o, self.features = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()), nn.Conv2d(8, 2, 1), {}

        def keep(module, args, out):
            self.features["a"] = out

        self.b[1].register_forward_hook(keep)

    def forward(self, x):
        self.b(x)
        return self.o(self.features["a"])


def test_functions_that_hold_the_model_are_refused():
    with pytest.raises(ModelError, match=r"must not hold the model itself.*keep \(forward hook of b.1\). Make it a"):
        qflow.prepare(Remembering().eval(), X)
    replaced = Keys().eval()
    replaced.forward = lambda x: F.relu(replaced.a(x))
    with pytest.raises(ModelError, match=r"but got .*<lambda> \(forward of the model\)"):
        qflow.prepare(replaced, X)
    bound = Keys().eval()
    bound.forward = functools.partial(bound.forward, target=None)  # copied with the model
    assert "a" in qflow.prepare(bound, X).weights


# ---- what would be a traceback


class Asserting(Conv):
    def forward(self, x):
        assert x.shape[0] == 2, "a batch of 2"
        return self.a(x)


class Attribute(Conv):
    def forward(self, x):
        return self.a(x.img)


def test_what_the_users_code_raises_is_one_line():
    with pytest.raises(ModelError, match="at one more sample got: a batch of 2"):
        qflow.prepare(Asserting().eval(), X)
    with pytest.raises(ModelError, match="but got: 'Tensor' object has no attribute 'img'"):
        qflow.prepare(Attribute().eval(), X)
    locked = Keys().eval()
    locked.lock = threading.Lock()
    with pytest.raises(ModelError, match="can be copied .*cannot pickle"):
        qflow.prepare(locked, X)


@dataclass(frozen=True)
class Record:
    feat: torch.Tensor
    other: object


class Plain:
    def __init__(self, feat, other):
        self.feat, self.other = feat, other


class Slotted:
    __slots__ = ("feat", "other")

    def __init__(self, feat, other):
        self.feat, self.other = feat, other


class Output(OrderedDict):
    """A mapping whose items are attributes, too."""

    def __init__(self, feat, other):
        super().__init__(feat=feat)
        self.feat = feat


FORMS = {"namedtuple": namedtuple("Two", "feat other"), "dataclass": Record, "object": Plain, "slots": Slotted}
FORMS["mapping with attributes"] = Output


class Skipped(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form = form

    def forward(self, x):
        if self.form == "dict":
            return {"feat": x.sigmoid()}
        return FORMS[self.form](x.sigmoid(), None)


class Around(Conv):
    def __init__(self, form):
        super().__init__()
        self.form, self.skipped, self.o = form, Skipped(form), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        y = self.skipped(self.a(x))
        return self.o(y["feat"] if self.form == "dict" else y.feat)


@pytest.mark.parametrize("form", ["dict", *FORMS])
def test_a_skipped_module_may_give_any_structure(form):
    prepared = qflow.prepare(Around(form).eval(), X, skip=["skipped"])
    qflow.calibrate(prepared, [X])
    with torch.no_grad(), prepared.quantized():
        prepared(X)
        assert "skipped" in prepared.ran
    assert prepared.graph.by_name["o"].inputs == ("skipped",)


@pytest.mark.parametrize("form", [Plain, Slotted, Output])
def test_a_model_may_return_an_object_of_its_own(form):
    class Returns(Conv):
        def forward(self, x):
            return form(self.a(x), None)

    prepared = qflow.prepare(Returns().eval(), X)
    assert prepared.graph.outputs == (("feat", "a"),)
    qflow.calibrate(prepared, [X])
    assert isinstance(prepared(X), form)


def test_training_a_frozen_model_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 2, 1)).eval().requires_grad_(False)
    prepared = qflow.prepare(model, X)
    qflow.calibrate(prepared, [X])
    optimizer = torch.optim.SGD(prepared.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="got a model in which all are frozen"):
        train(prepared, [(X, None)], lambda out, _: out.mean(), optimizer, settings=QatSettings(steps=1))


class Lookup(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.lin = torch.randn(10, 8), nn.Linear(8, 4)

    def forward(self, ids, x):
        return self.lin(torch.from_numpy(self.table.numpy()[ids.numpy()]) + x)


def test_integers_that_go_through_numpy_are_refused():
    with pytest.raises(ModelError, match=r"but got const\[\[add\]\], read by \[add\], computed where tracing cannot"):
        qflow.prepare(Lookup().eval(), (torch.tensor([3, 1, 4]), torch.randn(3, 8)))


class HiddenNan(nn.Module):
    calls = 0  # of the class: a copy counts on

    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(8, 8)

    def forward(self, x):
        HiddenNan.calls += 1
        return self.lin(x) * (1.0 if HiddenNan.calls % 2 else float("nan"))


def test_a_nan_that_only_the_copy_gives_is_refused():
    with pytest.raises(ModelError, match="differs in 16 NaN"):
        qflow.prepare(HiddenNan().eval(), torch.randn(2, 8))


def test_the_model_that_is_prepared_stays_as_it_was():
    model = Scaled().eval()
    before = copy.deepcopy(model.state_dict())
    qflow.prepare(model, X)
    assert type(model.a) is nn.Conv2d
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize("write", [lambda w: w.data.clamp_(max=0.01), lambda w: w.data.mul_(0.5)])
def test_a_model_that_writes_to_its_parameters_is_refused_by_name(write):
    class Writing(Conv):
        def forward(self, x):
            write(self.a.weight)
            return self.a(x)

    with pytest.raises(ModelError, match=r"keeps its parameters, but got a.weight changed by a call"):
        qflow.prepare(Writing().eval(), X)
