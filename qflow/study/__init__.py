"""A study: its start, stages, budget, best trial, Pareto set, and end."""

__all__ = [
    "assemble",
    "baselines",
    "causes",
    "checks",
    "finish",
    "int16_weights",
    "manifest",
    "missed",
    "mixes",
    "result",
    "session",
    "stages",
    "start",
    "train_stage",
]
