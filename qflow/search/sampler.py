"""Optuna's samplers, as the search uses them."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import optuna
from optuna.samplers import BaseSampler


def make_sampler(kind: str, seed: int, n_trials: int) -> BaseSampler:
    """Return the sampler of a name in SAMPLERS (proposal.py), for a search of `n_trials`."""
    startup = max(1, min(10, n_trials // 4))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # group=True
        if kind == "tpe":
            return optuna.samplers.TPESampler(multivariate=True, group=True, n_startup_trials=startup, seed=seed)
        if kind == "nsga2":
            return optuna.samplers.NSGAIISampler(population_size=max(4, min(20, n_trials // 5)), seed=seed)
        if kind == "gp":
            return optuna.samplers.GPSampler(n_startup_trials=startup, seed=seed)
        return optuna.samplers.RandomSampler(seed=seed)


@contextmanager
def quiet(sampler: BaseSampler) -> Iterator[None]:
    """Suppress warnings of fixed values out of range; run the Gaussian process on one thread (12 times faster)."""
    torch = sys.modules.get("torch") if isinstance(sampler, optuna.samplers.GPSampler) else None
    threads = torch.get_num_threads() if torch else 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if torch:
                torch.set_num_threads(1)
            yield
        finally:
            if torch:
                torch.set_num_threads(threads)
