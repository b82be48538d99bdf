"""qflow: one tracked workflow from a float PyTorch model to the best int8/int16/fp16 mix for Journey 6M."""

import importlib
from typing import Any

from qflow.core.version import VERSION

__version__ = VERSION

# Imported on first use, so that `import qflow` and --help stay fast.
_PLACES = {
    "qflow.api.library": "prepare configure calibrate check cost set_fake_quantize FakeQuantState",
    "qflow.api.load": "load",
    "qflow.api.prepared": "Prepared",
    "qflow.api.plugin_check": "check_qat_model",
    "qflow.api.qat_mode": "PrepareMethod QATMode get_qat_mode set_qat_mode",
    "qflow.api.training": "train",
    "qflow.api.quant_analysis": "QuantAnalysis",
    "qflow.api.frames": "to_frame",
    "qflow.api.imports": "read_mix read_sensitivity",
    "qflow.api.repair": "repair_model",
    "qflow.analysis.checks.model_check": "check_text",
    "qflow.core.dtype": "QDtype",
    "qflow.core.qconfig": "OpQConfig QConfig",
    "qflow.core.setter": "HighPrecisionOutput ObserverSetter TemplateSetter",
    "qflow.core.settings": "CalibrationSettings QatSettings",
    "qflow.export.model": "export_model",
    "qflow.quant.model.quantized_model": "scales",
}
_HOME = {name: place for place, names in _PLACES.items() for name in names.split()}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name]), name)
    plugin = importlib.import_module("qflow.api.plugin_names")
    if name in plugin.__all__:
        return getattr(plugin, name)
    raise AttributeError(f"module 'qflow' has no attribute {name!r}")


def __dir__() -> list[str]:
    plugin = importlib.import_module("qflow.api.plugin_names")
    return sorted({"__version__", *_HOME, *plugin.__all__})
