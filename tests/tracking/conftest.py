"""A store per test."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from qflow.tracking.connect import open_store
from qflow.tracking.mlflow_tracker import MlflowTracker


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A folder with a whole, empty MLflow database."""
    folder = tmp_path / "store"
    open_store(None, folder)
    return folder


@pytest.fixture
def open_tracker(store: Path) -> Callable[[], MlflowTracker]:
    """Opens the store of this test, again and again if asked."""
    return lambda: MlflowTracker.open(None, store, "experiment")


@pytest.fixture
def tracker(open_tracker: Callable[[], MlflowTracker]) -> MlflowTracker:
    """A tracker on the store of this test."""
    return open_tracker()
