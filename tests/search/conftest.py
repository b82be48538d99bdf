"""A store per test: copies of two databases, because building them takes 2 s of CPU."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from qflow.core.store import build_aside
from qflow.search.database import _create
from qflow.tracking.mlflow_tracker import MlflowTracker


@pytest.fixture
def store(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with whole, empty databases of MLflow and Optuna."""
    template = tmp_path_factory.getbasetemp() / "template-store"
    if not (template / "mlflow.db").exists():
        MlflowTracker.open(None, template, "template")
    if not (template / "optuna.db").exists():
        build_aside(template / "optuna.db", _create)
    folder = tmp_path / "store"
    folder.mkdir()
    for name in ("mlflow.db", "optuna.db"):
        shutil.copy(template / name, folder / name)
    return folder
