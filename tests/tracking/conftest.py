"""A store per test: a copy of one database, because building one takes 2 s of CPU."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qflow.tracking.mlflow_tracker import MlflowTracker


@pytest.fixture
def store(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a whole, empty MLflow database."""
    template = tmp_path_factory.getbasetemp() / "template-store"
    if not (template / "mlflow.db").exists():
        MlflowTracker.open(None, template, "template")
    folder = tmp_path / "store"
    folder.mkdir()
    shutil.copy(template / "mlflow.db", folder / "mlflow.db")
    return folder


@pytest.fixture
def open_tracker(store: Path) -> Callable[[], MlflowTracker]:
    """Opens the store of this test, again and again if asked."""
    return lambda: MlflowTracker.open(None, store, "experiment")


@pytest.fixture
def tracker(open_tracker: Callable[[], MlflowTracker]) -> MlflowTracker:
    """A tracker on the store of this test."""
    return open_tracker()
