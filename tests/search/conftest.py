"""A store per test."""

from __future__ import annotations

from pathlib import Path

import pytest

from qflow.core.store import build_aside
from qflow.search import database
from qflow.tracking.connect import open_store


@pytest.fixture
def store(tmp_path: Path) -> Path:
    """A folder with whole, empty databases of MLflow and Optuna."""
    folder = tmp_path / "store"
    open_store(None, folder)
    build_aside(folder / "optuna.db", database._create)
    return folder
