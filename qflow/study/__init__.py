"""A study: its start, stages, budget, best trial, Pareto set, and end."""

__all__ = [
    "archive",
    "assemble",
    "baselines",
    "causes",
    "checks",
    "fewer",
    "finish",
    "gate",
    "int16_weights",
    "manifest",
    "missed",
    "mixes",
    "rebuild",
    "report",
    "result",
    "session",
    "stages",
    "start",
    "train_stage",
]
