"""The manifest of a study: what its numbers depend on beside the configuration, for rebuilding a trial."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import torch

from qflow.core.errors import ConfigError
from qflow.core.record import digest
from qflow.core.version import VERSION
from qflow.tasks.sequences import lengths_of
from qflow.tracking.datasets import DataSet
from qflow.trial.evaluator import Evaluator

SEQUENCES = "eval_sequences"
"""Entry of the manifest: lengths of the sequences of evaluation frames, in the order of the samples."""
PACKAGES = ("torch", "numpy", "mlflow", "optuna", "hydra-core")


def manifest(evaluator: Evaluator) -> dict[str, Any]:
    """Return versions, threads, digests of weights, graph and data, and the evaluation samples and their sequences."""
    task = evaluator.task
    lengths = lengths_of(task.data.evaluation, "evaluation") if task.cached_attrs else ()
    return {
        "qflow": VERSION,
        "python": platform.python_version(),
        "versions": {package: importlib.metadata.version(package) for package in PACKAGES},
        "device": evaluator.task.device,
        "threads": torch.get_num_threads(),
        "weights": evaluator.identity.content["weights"],
        "graph": digest(evaluator.graph),
        "split_shared": list(evaluator.split_shared),
        "data": digest([evaluator.identity.content["data"], evaluator.augmented(evaluator.default_calibration)]),
        "profile": profile_digest(evaluator.profile) if evaluator.profile else "",
        "eval_samples": evaluator.eval_samples,
        **({SEQUENCES: list(lengths)} if lengths else {}),
        "float_metric": evaluator.float_metric,
        **({"engine": evaluator.engine.version} if evaluator.engine.version else {}),
    }


def data_sets(evaluator: Evaluator) -> tuple[DataSet, ...]:
    """Return the calibration and the evaluation data, by the digest of every sample of them."""
    task = evaluator.task
    owner = task.data if isinstance(task.data, type) else type(task.data)
    return tuple(
        DataSet(
            name=f"{task.name} {split}",
            context=split,
            content=content,
            source=f"{owner.__module__}.{owner.__qualname__}",
            samples=len(getattr(task.data, split)),
        )
        for split, content in evaluator.identity.content["data"].items()
    )


def profile_digest(path: str) -> str:
    """Return the digest of the measured profile at `path`. Raises ConfigError if it cannot be read."""
    try:
        return digest(Path(path).read_bytes().hex())
    except OSError as error:
        raise ConfigError(
            f"A measured profile lies at device.profile, but got {path}: {error.strerror}. Restore it."
        ) from error
