"""What is installed, and what to install: found without importing it, as scikit-learn takes as long as PyTorch."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

DRIVERS = {
    "psycopg": '"psycopg[binary]"',
    "psycopg2": "psycopg2",
    "MySQLdb": "mysqlclient",
    "pymysql": "pymysql",
    "mysql": "mysql-connector-python",
    "pyodbc": "pyodbc",
    "boto3": "boto3",
    "azure": "azure-storage-blob",
    "google": "google-cloud-storage",
}
"""Packages through which databases and places of artifacts are reached, by the name that is imported."""


def missing_driver(error: BaseException) -> str:
    """Return the line for a driver of a store that is not installed; "" for any other exception."""
    name = (getattr(error, "name", None) or "").partition(".")[0]
    return no_driver(name) if isinstance(error, ModuleNotFoundError) and name in DRIVERS else ""


def no_driver(name: str) -> str:
    """Return the line for a driver that is not installed, by the name that is imported."""
    package = DRIVERS.get(name, name)
    return f"A store is reached through its driver, but got none called {name}. Install it: pip install {package}."


def folder_of(package: str) -> Path:
    """Return the folder of an installed package. Raises ModuleNotFoundError for one that is not installed."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{package} is needed, but is not installed.")
    return Path(spec.origin).parent
