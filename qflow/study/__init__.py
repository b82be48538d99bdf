"""A study: its start, stages, budget, best trial, Pareto set, and end."""

__all__ = ["assemble", "checks", "finish", "int16_weights", "manifest", "session", "stages", "start", "train_stage"]
