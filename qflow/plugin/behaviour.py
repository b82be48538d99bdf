"""The plugin's behaviour on a tiny model, against the formulas and rules that qflow predicts it by.

Scales: max(|min|, |max|) / 127.5 for int8, / 32767.5 for int16, of moving averages with constant 0.01; of weights for
each output channel. Rounding is half to even. int16 before a pool, and at the inputs of a fused conv + add, is lowered.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.ao.quantization import DeQuantStub

from qflow.core.dtype import QDtype
from qflow.core.qconfig import OpQConfig
from qflow.core.settings import CalibrationSettings
from qflow.plugin.checked import Checked
from qflow.plugin.prepared import PluginModel, prepared_by_plugin
from qflow.plugin.public import Public
from qflow.plugin.qconfigs import plugin_qconfig

MARCH = "nash-m"
MINMAX = CalibrationSettings(method="minmax")
CLOSE = 1e-5
FIXED = 0.05
ADD = "_generated_add_0"


class Tiny(nn.Module):
    """Stub, conv + batch norm + ReLU, pool, conv + add, conv, stub; inputs are [B, 3, 8, 8]."""

    def __init__(self, public: Public) -> None:
        super().__init__()
        self.quant = public["QuantStub"]()
        self.conv1, self.norm, self.relu = nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU()
        self.pool = nn.MaxPool2d(2)
        self.conv2, self.conv3 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 2, 1)
        self.dequant = (public.find("DeQuantStub") or DeQuantStub)()

    def forward(self, x: Tensor) -> Tensor:
        """Run the model."""
        x = self.pool(self.relu(self.norm(self.conv1(self.quant(x)))))
        out: Tensor = self.dequant(self.conv3(self.conv2(x) + x))
        return out


def behaviour(public: Public) -> Iterator[Checked]:
    """Yield the checks. Raises TrialError if the plugin cannot run the model."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = Tiny(public).eval()
        first, second = torch.rand(4, 3, 8, 8) * 2 - 1, torch.rand(4, 3, 8, 8) * 2 - 1
    with torch.no_grad():
        first *= 2.0 / first.abs().max()
        second *= 4.0 / second.abs().max()
        before = copy.deepcopy(model.state_dict())
        half = OpQConfig(output=QDtype.qint16, weight=QDtype.qint8)
        asked = {"quant": OpQConfig(output=QDtype.qint8), "conv1": half, ADD: half, "conv3": OpQConfig(output=None)}
        made = _prepared(public, model, first, asked)
        same = all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
        yield Checked("prepare", "leaves the float model unchanged", "unchanged" if same else "changed", same)
        yield from _graph(made)
        yield from _scales(made, model, (first, second))
        yield from _rounding(made)
        pinned = {"quant": OpQConfig(output=QDtype.qint16), "conv1": OpQConfig(output=QDtype.qint8, fixed_scale=FIXED)}
        other = _prepared(public, model, first, pinned)
        other.calibrate([((first,), 4), ((second,), 4)])
        yield _close("scale of an int16 input", 2.02 / 32767.5, _scale(other, "quant output"))
        yield _close("scale of FixedScaleObserver", FIXED, _scale(other, "conv1 output"))


def _prepared(public: Public, model: nn.Module, example: Tensor, asked: dict[str, OpQConfig]) -> PluginModel:
    qconfigs = {name: plugin_qconfig(public, op, MINMAX) for name, op in asked.items()}
    return prepared_by_plugin(public, model, (example,), qconfigs, MARCH)


def _graph(made: PluginModel) -> Iterator[Checked]:
    """Check fusion, names and fallbacks."""
    names = ", ".join(made.modules)
    for name in ("quant", "conv1", ADD, "conv3"):
        yield Checked(f"module {name}", "is in model_check_result.txt", names, name in made.modules)
    absorbed = "conv2" not in made.modules and "norm" not in made.modules and "relu" not in made.modules
    yield Checked("fusion", "conv1 takes norm and relu, the add takes conv2", names, absorbed)
    rules = {
        "conv1": (QDtype.qint8, "int16 before a max pool becomes qint8"),
        ADD: (QDtype.qint16, "an int16 output of a conv + add stays qint16"),
        "conv3": (None, "a qconfig without activation gives high precision"),
    }
    for name, (dtype, rule) in rules.items():
        if (module := made.modules.get(name)) is not None:
            yield Checked(f"dtype of {name}", rule, str(module.output or "float32"), module.output == dtype)


def _scales(made: PluginModel, model: nn.Module, batches: tuple[Tensor, Tensor]) -> Iterator[Checked]:
    """Check what a calibration over two batches with the largest values 2 and 4 leaves."""
    made.calibrate([((batch,), len(batch)) for batch in batches])
    yield _close("scale of an int8 input", 2.02 / 127.5, _scale(made, "quant output"))
    conv, norm = model.conv1, model.norm
    assert isinstance(conv, nn.Conv2d)
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_var is not None
    folded = conv.weight * (norm.weight / torch.sqrt(norm.running_var + norm.eps)).reshape(-1, 1, 1, 1)
    own, expected = _scale(made, "conv1 weight"), folded.abs().amax((1, 2, 3)) / 127.5
    size = None if own is None else own.numel()
    yield Checked("weight scales", "one for each of 4 output channels", str(size), size == 4)
    if own is not None and size == 4:
        worst = int(((own - expected) / expected).abs().argmax())
        yield _close("weight scale of the batch norm folded in", float(expected[worst]), own[worst])


def _rounding(made: PluginModel) -> Iterator[Checked]:
    """Check rounding half to even, and the clamp, at the input's quantizer."""
    scale = _scale(made, "quant output")
    if scale is None:
        return
    steps = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, 500.0, -500.0, 3.2])
    x = (steps * scale).reshape(1, 1, 1, -1).expand(1, 3, 8, 8)
    found = made.outputs({"quant": "quant"}, (x.contiguous(),)).get("quant")
    got: Any = None if found is None else (found[0, 0, 0] / scale).round().int().tolist()
    expected = [0, 2, 2, 0, -2, 127, -128, 3]
    yield Checked("rounding of 0.5, 1.5, 2.5, ... steps", str(expected), str(got), got == expected)


def _scale(made: PluginModel, place: str) -> Tensor | None:
    return made.quantizers.get(place, ("", None))[1]


def _close(what: str, expected: float, got: Tensor | None) -> Checked:
    value = float(got) if got is not None and got.numel() == 1 else None
    ok = value is not None and abs(value - expected) <= CLOSE * expected
    return Checked(what, f"{expected:.6g}", "none in the state dict" if value is None else f"{value:.6g}", ok)
