"""A surrogate of the drop of a mix: predicted errors and their pairs, corrected by the drops that were measured.

With x_i = 1 if letter i is int8, e_i the predicted share of operator i in the error of all int8, and S the drop of all
int8 beyond that of the most accurate mix, the drop of a mix under some settings (calibration, training) is

    low + S (sum of e_i x_i  +  sum of a_i x_i  +  sum over pairs of b_ij x_i x_j  +  r)

a_i, b_ij and r are normally distributed around 0 with the standard deviations SINGLE e_i, PAIR min(e_i, e_j) and REST:
a predicted error may be wrong by most of its size, two errors may add up to more or less than their sum, and what a mix
loses beyond that is its own. Under other settings they are correlated by ALIKE. Given measured drops, the drop of every
mix is normally distributed too (Gaussian process regression: Rasmussen and Williams 2006, chapter 2), and the means of
a_i and b_ij correct the program of assign.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from qflow.search.assign import Problem

SINGLE, PAIR, REST, ALIKE = 0.7, 0.5, 0.02, 0.8
LEAST = 0.01  # the least e_i, over the number of operators: an error that is predicted to be 0 may be none
JITTER = 1e-6  # keeps the covariance matrix invertible, and stands for the noise of a measured drop
PAIRS = 24  # the largest pairs, which the corrected program counts; each is a further variable of it


@dataclass(frozen=True)
class Measurement:
    """The measured drop of a mix, and the settings around it as text."""

    mix: str
    drop: float
    settings: str = ""


class Surrogate:
    """Expected drops, given measured ones. `low` and `high` are the drops of the most accurate mix and of all int8."""

    def __init__(self, problem: Problem, measured: Sequence[Measurement], low: float, high: float) -> None:
        self.problem, self.measured = problem, measured
        self.low, self.span = low, max(high - low, 1e-9)
        gains = np.array([max(o.gain, 0.0) for o in problem.operators])
        total = float(gains.sum())
        self.shares = gains / total if total > 0.0 else np.full(len(gains), 1.0 / max(len(gains), 1))
        self.parts = np.maximum(self.shares, LEAST / max(len(gains), 1))
        self.falling = np.argsort(-self.parts, kind="stable")
        self.known = self._letters([m.mix for m in measured])
        alike = np.array([self._alike(m.settings) for m in measured]).reshape(len(measured), len(measured))
        covariance = self._covariance(self.known, [m.mix for m in measured]) * alike
        self.lower = np.linalg.cholesky(covariance + JITTER * np.eye(len(measured)))
        off = np.array([(m.drop - low) / self.span for m in measured]) - self.known @ self.shares
        self.weights = np.linalg.solve(self.lower.T, np.linalg.solve(self.lower, off))

    def expected(self, mixes: Sequence[str], settings: str = "") -> tuple[np.ndarray, np.ndarray]:
        """Return the means and the standard deviations of the drops of `mixes` under `settings`."""
        letters = self._letters(mixes)
        shared = self._covariance(letters, mixes) * self._alike(settings)
        means = letters @ self.shares + shared @ self.weights
        own = letters @ (SINGLE * self.parts) ** 2 + self._pairs(letters) + REST**2
        deviations = np.sqrt(np.maximum(own - (np.linalg.solve(self.lower, shared.T) ** 2).sum(0), JITTER))
        return self.low + self.span * means, self.span * deviations

    def corrected(self, settings: str = "") -> Problem:
        """Return the problem whose errors are the expected drops of operators and pairs beyond `low`."""
        weights = self.weights * self._alike(settings)
        singles = self.shares + (SINGLE * self.parts) ** 2 * (self.known.T @ weights)
        pairs = (PAIR * np.minimum.outer(self.parts, self.parts)) ** 2 * ((self.known.T * weights) @ self.known)
        first, second = np.triu_indices(len(singles), 1)
        largest = np.argsort(-np.abs(pairs[first, second]), kind="stable")[:PAIRS]
        operators = [
            replace(o, int8_error=self.span * float(single), int16_error=0.0)
            for o, single in zip(self.problem.operators, singles, strict=True)
        ]
        amounts = {
            (operators[i].place, operators[j].place): self.span * float(pairs[i, j])
            for i, j in zip(first[largest], second[largest], strict=True)
        }
        return replace(self.problem, operators=tuple(operators), pairs={p: a for p, a in amounts.items() if a})

    def _letters(self, mixes: Sequence[str]) -> np.ndarray:
        """Return x of each of `mixes`: a row of zeros and ones over the operators."""
        letters = np.frombuffer("".join(mixes).encode(), np.uint8).reshape(len(mixes), self.problem.letters)
        return np.asarray(letters[:, [o.place for o in self.problem.operators]] == ord("8"), dtype=float)

    def _covariance(self, letters: np.ndarray, mixes: Sequence[str]) -> np.ndarray:
        """Return the covariances of `mixes` (with these letters) and the measured ones under equal settings."""
        found = (letters * (SINGLE * self.parts) ** 2) @ self.known.T
        for k, (other, m) in enumerate(zip(self.known, self.measured, strict=True)):
            found[:, k] += self._pairs(letters * other) + REST**2 * np.array([mix == m.mix for mix in mixes], float)
        return np.asarray(found)

    def _pairs(self, letters: np.ndarray) -> np.ndarray:
        """Return the variance of the pairs in each row: of two shares in falling order the second is the smaller."""
        ordered = letters[:, self.falling]
        before = np.cumsum(ordered, axis=1) - ordered
        found: np.ndarray = (ordered * before) @ (PAIR * self.parts[self.falling]) ** 2
        return found

    def _alike(self, settings: str) -> np.ndarray:
        """Return the correlation of each measured drop with one under `settings`."""
        return np.array([1.0 if m.settings == settings else ALIKE for m in self.measured])


def expected_fall(level: float, means: np.ndarray, deviations: np.ndarray) -> np.ndarray:
    """Return by how much normally distributed numbers are expected to fall below `level`."""
    z = (level - means) / deviations
    density = np.exp(-0.5 * z**2) / np.sqrt(2.0 * np.pi)
    return np.asarray(np.maximum(deviations * (z * below(level, means, deviations) + density), 0.0))


def below(level: float, means: np.ndarray, deviations: np.ndarray) -> np.ndarray:
    """Return how probable it is that normally distributed numbers are at most `level`."""
    from scipy.special import ndtr

    found: np.ndarray = ndtr((level - means) / deviations)
    return found


def hypervolume(points: Sequence[tuple[float, float]], worst: tuple[float, float]) -> float:
    """Return the area that points of two costs dominate, up to `worst`."""
    area, top = 0.0, worst[1]
    for cost, price in sorted(points):
        if cost < worst[0] and price < top:
            area += (worst[0] - cost) * (top - price)
            top = price
    return area
