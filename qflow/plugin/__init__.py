"""Horizon's plugin where it is installed: its engine for trials, its names of operators, a check of its contract."""

__all__ = [
    "comparison",
    "contract",
    "engine",
    "names",
    "public",
]
