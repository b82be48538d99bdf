"""The search space, the Optuna study, the loop that survives a kill, the strategies.

The only home of optuna. A solver or strategy sees dictionaries and arrays, never a model.
"""

__all__ = ["assign", "cost_terms", "domain", "loop", "objective", "outcome", "strategies", "study", "surrogate"]
