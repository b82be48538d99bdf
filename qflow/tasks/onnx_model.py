"""Loads ONNX files as plain PyTorch modules (with onnx2torch, extra `onnx`; no TorchScript).

    task.model: {_target_: qflow.tasks.onnx_model.load, path: model.onnx}

Module names are the ONNX node names, so that a qconfig can be read next to the ONNX graph. The batch axis of the file
must be symbolic, as for any model that qflow prepares.
"""

from __future__ import annotations

from pathlib import Path

from torch import nn

from qflow.core.errors import ConfigError, ModelError


def load(path: str | Path) -> nn.Module:
    """The network in `path`, in eval mode.

    Raises ConfigError if onnx2torch is not installed, ModelError if it cannot convert the file.
    """
    try:
        from onnx2torch import convert
    except (ImportError, RuntimeError) as error:  # torchvision raises RuntimeError if torch is of another build
        raise ConfigError(
            f"ONNX models need the extra `onnx` (onnx2torch and its torchvision), but got: {error}. "
            "pip install 'qflow[onnx]', with torch and torchvision of one build."
        ) from error
    if not Path(path).is_file():
        raise ModelError(f"An ONNX model is a file, but got {path}. Check task.model.path.")
    try:
        model: nn.Module = convert(str(path))
    except Exception as error:  # onnx and onnx2torch raise many types: unknown operators, broken protobufs
        text = " ".join(str(error).split()) or type(error).__name__
        raise ModelError(f"An ONNX file holds operators that onnx2torch converts, but got: {text}.") from error
    return model.eval()
