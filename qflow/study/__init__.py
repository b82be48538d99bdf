"""A study: its start, stages, budget, best trial, Pareto set, and end."""

__all__ = [
    "assemble",
    "baselines",
    "causes",
    "checks",
    "finish",
    "manifest",
    "mixes",
    "session",
    "stages",
    "start",
    "train_stage",
]
