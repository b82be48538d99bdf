"""The search space, the Optuna study, the trial loop, which survives a kill, and the search strategies.

No other package imports optuna. Solvers and strategies see dictionaries and arrays, never a model.
"""

__all__ = [
    "assign",
    "attempt",
    "carried",
    "cost_terms",
    "database",
    "domain",
    "driver",
    "health",
    "importance",
    "integer_program",
    "loop",
    "next_mix",
    "noise",
    "objective",
    "outcome",
    "patient_storage",
    "proposal",
    "reconcile",
    "sampler",
    "spool",
    "standing",
    "stored",
    "strategies",
    "study",
    "surrogate",
    "terms",
]
