"""Evaluating one trial: what all trials share, precisions, training, the cache, the record.

No configuration and no store: a trial is a function of a task and its settings.
"""

__all__ = ["diagnosis", "evaluator", "record", "training"]
