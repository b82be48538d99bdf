"""The store of a test is the one that MLflow builds."""

import sqlite3
import sys
from contextlib import closing

import pytest
from support.built_once import built_anew

from qflow.core.errors import TrackingError
from qflow.tracking.connect import open_store


def content(folder):
    """Tables by their lines, whose order MLflow's migrations leave to chance, and rows without the times of making."""
    with closing(sqlite3.connect(folder / "mlflow.db")) as found:
        found.execute("UPDATE experiments SET creation_time = 0, last_update_time = 0")
        statements = [line.replace(str(folder), "FOLDER") for line in found.iterdump()]
    return sorted(sorted(line.strip(" ,") for line in statement.splitlines()) for statement in statements)


def test_the_store_of_a_test_holds_what_mlflow_puts_into_a_new_one(store, tmp_path):
    with built_anew():
        open_store(None, tmp_path / "new")
    assert content(store) == content(tmp_path / "new")


def test_a_database_without_its_driver_is_one_line_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyodbc", None)
    with pytest.raises(TrackingError, match=r"got none called pyodbc. Install it: pip install pyodbc"):
        open_store("mssql://bob:s3cret@host/x", tmp_path)
