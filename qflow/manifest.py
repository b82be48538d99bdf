"""The manifest: what a study's numbers depend on beside the configuration, so that a trial can be rebuilt."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import torch

from qflow import __version__
from qflow.bench import Bench
from qflow.core.errors import ConfigError
from qflow.core.record import digest

PACKAGES = ("torch", "numpy", "mlflow", "optuna", "hydra-core")


def manifest(bench: Bench) -> dict[str, Any]:
    """Versions, threads, and fingerprints of weights, graph and data."""
    return {
        "qflow": __version__,
        "python": platform.python_version(),
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
        "device": bench.task.device,
        "threads": torch.get_num_threads(),
        "weights": bench.identity.content["weights"],
        "graph": digest(bench.graph),
        "data": digest([bench.identity.content["data"], bench.augmented(bench.default_calibration)]),
        "profile": profile_digest(bench.profile) if bench.profile else "",
        "eval_samples": bench.eval_samples,
        "float_metric": bench.float_metric,
    }


def profile_digest(path: str) -> str:
    """Names the content of the measured profile. Raises ConfigError where there is none at `path`."""
    try:
        return digest(Path(path).read_bytes().hex())
    except OSError as error:
        raise ConfigError(
            f"A measured profile lies at device.profile, but got {path}: {error.strerror}. Bring it back."
        ) from error
