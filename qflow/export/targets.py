"""The targets of an export by name."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from qflow.export import hmct, native, onnx, plugin, plugin35, torch
from qflow.export.contract import Exported, Subject

TARGETS: Mapping[str, Callable[[Subject, Path], Exported]] = {
    "plugin": plugin.export,
    "plugin35": plugin35.export,
    "hmct": hmct.export,
    "onnx": onnx.export,
    "torch": torch.export,
    "qflow": native.export,
}
