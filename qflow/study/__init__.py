"""A study: its start, stages, budget, best and Pareto set, and its ending."""

__all__ = ["assemble", "checks", "finish", "manifest", "session", "stages", "start", "train_stage"]
