"""What `from horizon_plugin_pytorch.quantization import ...` finds."""

from horizon_plugin_pytorch.dtype import qint8, qint16
from horizon_plugin_pytorch.quantization.check_qat_model import check_qat_model
from horizon_plugin_pytorch.quantization.fake_quantize import FakeQuantize, FakeQuantState, set_fake_quantize
from horizon_plugin_pytorch.quantization.observer_v2 import (
    ClipObserver,
    ClipStdObserver,
    FixedScaleObserver,
    KLObserver,
    MinMaxObserver,
    MixObserver,
    MSEObserver,
    PercentileObserver,
)
from horizon_plugin_pytorch.quantization.prepare import PrepareMethod, prepare
from horizon_plugin_pytorch.quantization.qconfig import QConfig, get_qconfig
from horizon_plugin_pytorch.quantization.stubs import DeQuantStub, QuantStub

__all__ = [
    "ClipObserver", "ClipStdObserver", "DeQuantStub", "FakeQuantState", "FakeQuantize", "FixedScaleObserver",
    "KLObserver", "MSEObserver", "MinMaxObserver", "MixObserver", "PercentileObserver", "PrepareMethod", "QConfig",
    "QuantStub", "check_qat_model", "get_qconfig", "prepare", "qint8", "qint16", "set_fake_quantize",
]  # fmt: skip
