"""The evaluation of one trial: the state that all trials share, precisions, training, the cache, the record.

A trial is a function of a task and its settings. This package reads no configuration and writes to no store.
"""

__all__ = [
    "cache",
    "diagnosis",
    "engine",
    "evaluator",
    "findings",
    "frames",
    "outputs",
    "parts",
    "record",
    "shared",
    "training",
]
