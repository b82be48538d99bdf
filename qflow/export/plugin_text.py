"""The texts of the target `plugin`: its Python module and its README."""

from __future__ import annotations

from pathlib import Path
from string import Template

from qflow.export.precisions import OpPrecision

MODULE = Template('''"""Precisions and scales for horizon_plugin_pytorch of OpenExplorer 3.0.x, written by qflow.

OPERATORS is what qflow judged: output dtype (None: high precision), scale, weight dtype, requantized inputs by
position, and whether QAT keeps the scale. An operator without a scale is calibrated by the plugin. names.csv beside
this file tells the plugin's name of each operator; a row takes part where `sure` is yes. All other operators take the
plugin's default setter.
"""

import csv
from pathlib import Path

from horizon_plugin_pytorch.quantization.qconfig_template import (
    ModuleNameQconfigSetter,
    default_calibration_qconfig_setter,
    default_qat_fixed_act_qconfig_setter,
    default_qat_qconfig_setter,
)
from torch import float16

try:
    from horizon_plugin_pytorch.quantization import get_qconfig, qint8, qint16
except ImportError:
    from horizon_plugin_pytorch.dtype import qint8, qint16
    from horizon_plugin_pytorch.quantization.qconfig import get_qconfig
try:
    from horizon_plugin_pytorch.quantization import (
        FakeQuantize,
        FixedScaleObserver,
        MinMaxObserver,
        MSEObserver,
        QConfig,
    )
except ImportError:
    from horizon_plugin_pytorch.quantization.fake_quantize import FakeQuantize
    from horizon_plugin_pytorch.quantization.observer_v2 import FixedScaleObserver, MinMaxObserver, MSEObserver
    from horizon_plugin_pytorch.quantization.qconfig import QConfig

MARCH = "$march"
QCONFIG = "$digest"

OPERATORS = {
$operators
}


def fixed(dtype, scale):
    """A quantizer with a scale that nothing moves."""
    return FakeQuantize.with_args(observer=FixedScaleObserver, scale=scale, dtype=dtype)


def judged(output, scale=None, weight=qint8, inputs=(), keep=False, observer=MSEObserver, fix_scale=False):
    """The qconfig with the scales that were judged; without a scale, the observer finds one."""
    at = dict(inputs)
    if output == float16:
        return get_qconfig(in_dtype=float16, weight_dtype=float16, out_dtype=float16)
    plain = get_qconfig(observer=observer, weight_dtype=weight, out_dtype=output, fix_scale=fix_scale)
    positions = range(max(at) + 1) if at else ()
    return QConfig(
        activation=plain.activation if scale is None else fixed(output, scale),
        weight=plain.weight,
        input=[fixed(*at[i]) if i in at else None for i in positions] or None,
    )


def moving(output, scale=None, weight=qint8, inputs=(), keep=False):
    """The qconfig for QAT with moving scales. Where calibration had a fixed one, they begin at the first batch."""
    if keep or inputs or output is None or output == float16:
        return judged(output, scale, weight, inputs, observer=MinMaxObserver, fix_scale=keep)
    return get_qconfig(observer=MinMaxObserver, weight_dtype=weight, out_dtype=output)


def names():
    """qflow's name -> the plugin's, where it is sure."""
    with open(Path(__file__).with_name("names.csv"), newline="") as file:
        return {row["qflow"]: row["plugin"] for row in csv.DictReader(file) if row["sure"] == "yes"}


def qconfigs(made, **more):
    """The plugin's name -> qconfig; of two calls of one module, the first decides."""
    found = {}
    for name, plugin in names().items():
        found.setdefault(plugin, made(**OPERATORS[name], **more))
    return found


module_name_to_qconfig = qconfigs(judged)


def calibration_setters():
    """For prepare: every named operator with its judged scale if it has one here, the others are calibrated."""
    return ModuleNameQconfigSetter(module_name_to_qconfig), default_calibration_qconfig_setter


def qat_fixed_act_setters():
    """For QAT of the weights alone: activations keep their judged scales, or those of the calibration."""
    kept = qconfigs(judged, observer=MinMaxObserver, fix_scale=True)
    return ModuleNameQconfigSetter(kept), default_qat_fixed_act_qconfig_setter


def qat_setters():
    """For QAT in which the scales of activations move, except those that were given or kept."""
    return ModuleNameQconfigSetter(qconfigs(moving)), default_qat_qconfig_setter


def missing(model):
    """Names and candidates of names.csv that a model prepared by the plugin has not, as (qflow's, the plugin's)."""
    have = {name for name, _ in model.named_modules()}
    with open(Path(__file__).with_name("names.csv"), newline="") as file:
        rows = [(row["qflow"], row["plugin"]) for row in csv.DictReader(file) if row["plugin"]]
    return [row for row in rows if row[1] not in have]
''')

README = Template("""# A mixed precision for horizon_plugin_pytorch, OpenExplorer 3.0.x

$origin- march: $march
- qconfig: $digest

Copy `qconfig_j6m.py` and `names.csv` beside your code, load the weights into your float model, and prepare it:

```python
import torch
from horizon_plugin_pytorch.march import set_march
from horizon_plugin_pytorch.quantization import FakeQuantState, prepare, set_fake_quantize
import qconfig_j6m

set_march(qconfig_j6m.MARCH)
float_model.load_state_dict(torch.load("weights.pt"))
model = prepare(float_model.eval(), example_inputs, qconfig_setter=qconfig_j6m.calibration_setters())
print(qconfig_j6m.missing(model))
model.eval(); set_fake_quantize(model, FakeQuantState.CALIBRATION)
for batch in calibration_loader: model(batch)
model.eval(); set_fake_quantize(model, FakeQuantState.VALIDATION)
```

Calibration observes the weights, the operators that names.csv does not name surely, and those without a scale in
OPERATORS; all others have fixed scales.

For QAT, prepare the float model again with `qat_fixed_act_setters()` (weights alone) or `qat_setters()` (scales move
too), and load what the calibrated model holds. Their observers differ, so that strict loading may fail; then

```python
load_observer_params(calibrated, qat)  # of the plugin; it lists what it cannot load
```

Under `qat_setters()` a moving scale does not begin at the judged one: a fixed scale has observed no range that could be
loaded, so the first batch sets it. Begin with a large batch, or keep the scales with `qat_fixed_act_setters()`.

| file | content |
|---|---|
| `qconfig_j6m.py` | dtype and scale of every operator, and the setters |
| `names.csv` | qflow's name, the plugin's name, how it was derived, and whether it is sure |
| `weights.pt`, `weights.safetensors` | the state dict of the float model, trained weights included |
$tables| `export.json` | files with their digests, fallbacks, and what could not be expressed |

Not known, and therefore `no` in names.csv: how the plugin counts the modules that it makes of functionals
(`_generated_add_0`). A candidate is a guess after the pattern of public configurations. Look the name up in the
prepared model (`model_check_result.txt` lists it), write it into `plugin`, and set `sure` to yes. Inputs need a
QuantStub each, under the name that names.csv gives, or another that you write there.

Not known: whether a fixed scale of a norm or softmax reaches the values inside it, which have scales of their own. It
is therefore not set, and the plugin calibrates these operators; `export.json` lists the judged scales.

Not known: where the plugin keeps `QConfig`, `FakeQuantize` and the observers. The file looks in `quantization`, then in
`quantization.qconfig`, `quantization.fake_quantize` and `quantization.observer_v2`. The modules of `set_march`,
`FakeQuantState`, `set_fake_quantize` and `load_observer_params` are not known either: correct an import that fails.
""")


def operators_text(ops: dict[str, OpPrecision]) -> str:
    """Return the entries of OPERATORS as Python, one a line."""
    return "\n".join(f"    {name!r}: dict({', '.join(_fields(op))})," for name, op in ops.items())


def _fields(op: OpPrecision) -> list[str]:
    found = [f"output={op.op.output}"]
    if op.scale is not None and not op.node.inner:
        found.append(f"scale={op.scale!r}")
    if op.node.weight is not None and op.op.weight is not None:
        found.append(f"weight={op.op.weight}")
    if op.inputs:
        found.append(f"inputs={{{', '.join(f'{i}: ({dtype}, {scale!r})' for i, (dtype, scale) in op.inputs.items())}}}")
    if op.op.frozen or op.pinned:
        found.append("keep=True")
    return found


def sensitivity_text(folder: Path) -> str:
    """Return the rows of the README's table for the sensitivity tables in `folder`."""
    use = "sensitivity, most sensitive first: `sensitive_op_calibration_8bit_weight_16bit_act_qconfig_setter`"
    return "".join(f"| `{path.name}` | {use} |\n" for path in sorted(folder.glob("*_sensitive_ops.pt")))
