"""A prepared model as what MLflow registers: its files, signature with named inputs and outputs, and input example."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path
from typing import Any

from torch import Tensor

from qflow.api.prepared import Prepared
from qflow.api.pyfunc import CONFIG, named_inputs, named_outputs
from qflow.core.version import VERSION
from qflow.quant.trace.calling import batch_size
from qflow.tracking.model_files import ModelFiles, write_model

LOADER = "qflow.api.pyfunc"
PACKAGES = ("torch", "numpy", "safetensors", "hydra-core", "omegaconf", "mlflow")


def write_registered(folder: Path, prepared: Prepared, bundle: Path) -> None:
    """Write the MLflow model of `prepared` into the new folder `folder`; `bundle` holds the files of its trial."""
    size = batch_size(prepared.sample)
    inputs = named_inputs(prepared)

    def spec(name: str, value: Tensor) -> tuple[str, Any, tuple[int, ...]]:
        rows = bool(value.ndim) and len(value) == size
        return name, value.detach().cpu().numpy().dtype, ((-1, *value.shape[1:]) if rows else tuple(value.shape))

    write_model(
        folder,
        bundle,
        ModelFiles(
            loader=LOADER,
            config=CONFIG,
            inputs=[spec(*pair) for pair in inputs],
            outputs=[spec(*pair) for pair in named_outputs(prepared)],
            example={name: value.detach().cpu().numpy() for name, value in inputs},
            requirements=[f"qflow=={VERSION}", *(f"{name}=={importlib.metadata.version(name)}" for name in PACKAGES)],
        ),
    )
