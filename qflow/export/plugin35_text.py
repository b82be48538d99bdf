"""The texts of the target `plugin35`: its Python module and its README."""

from __future__ import annotations

from string import Template

MODULE = Template('''"""Precisions and scales for horizon_plugin_pytorch of OpenExplorer 3.5 and later, by qflow.

OUTPUTS is what qflow judged: dtype of every output, and the threshold that fixes its scale (threshold / 128 for qint8,
/ 32768 for qint16); an output without one is calibrated. PORTS holds the dtypes of inputs and weights that are not all
int8. names.csv beside this file tells the plugin's name of each operator; a row takes part where `sure` is yes.
"""

import csv
from pathlib import Path

from horizon_plugin_pytorch.quantization import QconfigSetter, get_qconfig, qint8, qint16
from horizon_plugin_pytorch.quantization.qconfig_setter import (
    ConvDtypeTemplate,
    MatmulDtypeTemplate,
    ModuleNameTemplate,
)
from torch import float16

try:
    from horizon_plugin_pytorch.quantization import MinMaxObserver, MSEObserver
except ImportError:
    from horizon_plugin_pytorch.quantization.observer_v2 import MinMaxObserver, MSEObserver

MARCH = "$march"
QCONFIG = "$digest"

OUTPUTS = {
$outputs
}

PORTS = {
$ports
}


def named(entries):
    """Entries under the plugin's names, where they are sure; of two calls of one module, the first decides."""
    with open(Path(__file__).with_name("names.csv"), newline="") as file:
        names = {row["qflow"]: row["plugin"] for row in csv.DictReader(file) if row["sure"] == "yes"}
    found = {}
    for name, entry in entries.items():
        if name in names:
            found.setdefault(names[name], entry)
    return found


def templates():
    """From the most general to the most special: a later template overrides an earlier one."""
    return [
        ModuleNameTemplate({"": qint8}),
        ConvDtypeTemplate(input_dtype=qint8, weight_dtype=qint8),
        MatmulDtypeTemplate(input_dtypes=[qint8, qint8]),
        ModuleNameTemplate(named(PORTS)),
        ModuleNameTemplate(named(OUTPUTS), freeze=True),
    ]


def calibration_setter():
    """For prepare: every named operator with its judged scale, the others are calibrated."""
    return QconfigSetter(reference_qconfig=get_qconfig(observer=MSEObserver), templates=templates())


def qat_setter():
    """For QAT of the weights: named operators keep their judged scales, the others those of the calibration."""
    return QconfigSetter(reference_qconfig=get_qconfig(observer=MinMaxObserver, fix_scale=True), templates=templates())


def missing(model):
    """Names and candidates of names.csv that a model prepared by the plugin has not, as (qflow's, the plugin's)."""
    have = {name for name, _ in model.named_modules()}
    with open(Path(__file__).with_name("names.csv"), newline="") as file:
        rows = [(row["qflow"], row["plugin"]) for row in csv.DictReader(file) if row["plugin"]]
    return [row for row in rows if row[1] not in have]
''')

README = Template("""# A mixed precision for horizon_plugin_pytorch, OpenExplorer 3.5 and later

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
model = prepare(float_model.eval(), example_inputs, qconfig_setter=qconfig_j6m.calibration_setter())
print(qconfig_j6m.missing(model))
model.eval(); set_fake_quantize(model, FakeQuantState.CALIBRATION)
for batch in calibration_loader: model(batch)
model.eval(); set_fake_quantize(model, FakeQuantState.VALIDATION)
```

`prepare` writes what it decided to `qconfig_setting/`: compare `qconfig_dtypes.pt.py` with OUTPUTS and PORTS. For QAT,
prepare the float model again with `qat_setter()`, and load what the calibrated model holds: `load_observer_params` of
the plugin does so where observers differ and strict loading fails.

Files: `names.csv` (qflow's name, the plugin's, how it was derived, whether it is sure), `weights.pt` and
`weights.safetensors` (the state dict of the float model, trained weights included), `*_sensitive_ops.pt` (the
sensitivity tables, for SensitivityTemplate), `export.json` (digests, fallbacks, what could not be expressed).

Not known, and therefore `no` in names.csv: how the plugin counts the modules that it makes of functionals
(`_generated_add_0`). Look the name up in the prepared model, write it into `plugin`, and set `sure` to yes.

Not known: whether a threshold of a norm or softmax reaches the values inside it, which have scales of their own. It is
therefore not set, and the plugin calibrates these operators; `export.json` lists the judged scales.

Not known: where the plugin keeps the observers. The file looks in `quantization`, then in `quantization.observer_v2`.
The modules of `set_march`, `FakeQuantState`, `set_fake_quantize` and `load_observer_params` are not known either:
correct an import that fails.
""")
