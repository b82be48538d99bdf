"""Samples of the user's data set: drawn under fixed seeds, and with its errors in one line."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from qflow.core.errors import DataError, QflowError


@contextmanager
def seeded() -> Iterator[None]:
    """Fix the random seeds inside, so that a data set that draws random numbers gives the same samples every time."""
    ours, numpys = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            random.seed(0)
            np.random.seed(0)
            yield
    finally:
        random.setstate(ours)
        np.random.set_state(numpys)


def loaded(loader: DataLoader[Any], split: str) -> Iterator[Any]:
    """The batches of `loader`. Raises DataError for whatever the user's data set or collate raises."""
    iterator = iter(loader)
    while True:
        try:
            batch = next(iterator)
        except StopIteration:
            return
        except QflowError:
            raise
        except Exception as error:  # the user's code may raise anything
            text = " ".join(str(error).split())
            raise DataError(
                f"Samples of task.data.{split} must load and batch together, but got {type(error).__name__}: {text}. "
                "Correct the data set, or give task.data a collate."
            ) from error
        yield batch
