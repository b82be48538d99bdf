"""Where an installed package lies, found without importing it: scikit-learn takes as long to import as PyTorch."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path


def folder_of(package: str) -> Path:
    """Return the folder of an installed package. Raises ModuleNotFoundError for one that is not installed."""
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{package} is needed, but is not installed.")
    return Path(spec.origin).parent
