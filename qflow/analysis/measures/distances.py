"""Distances between the float outputs and the outputs of many variants of a model.

A variant is the float model with one quantizer switched on. Distances are collected chunk by chunk of the samples and
merged into one score for each variant at the end.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qflow.analysis.measures.kl_divergence import divergence
from qflow.analysis.measures.metrics import badness, distance
from qflow.analysis.measures.tables import Finding
from qflow.core.errors import DataError

MERGE = "sum over outputs of distance / mean |float output|"


class Distances:
    """Collects, for each of `count` variants, the distance of every output and sample in `metric`."""

    def __init__(self, metric: str, count: int) -> None:
        self.metric = metric
        self.values: list[dict[str, dict[int, Tensor]]] = [{} for _ in range(count)]
        """For each variant: output -> chunk -> distances of its samples."""
        self.chunk = -1
        self.sizes: dict[str, list[tuple[float, int]]] = {}
        self.float_outputs: dict[str, Tensor] = {}
        self.left_out: dict[str, str] = {}
        """Output -> why it has no distance."""
        self.nan: dict[str, int] = {}
        """Output -> number of samples in which the float model itself gives NaN; these values are ignored."""
        self.infinite: set[str] = set()
        """Outputs in which the float model itself gives infinite values."""
        self.samples = 0

    def reference(self, outputs: dict[str, Tensor], samples: int) -> None:
        """Take the float outputs of the next chunk, which has so many `samples`."""
        self.samples = samples
        self.chunk += 1
        self.float_outputs = {name: t for name, t in outputs.items() if t.is_floating_point() and t.numel()}
        for name, tensor in outputs.items():
            if name not in self.float_outputs:
                kind = str(tensor.dtype).removeprefix("torch.")
                self.left_out[name] = f"{kind} values have no distance" if tensor.numel() else "it holds no values"
        for name, tensor in self.float_outputs.items():
            finite = tensor.double()[tensor.isfinite()].abs()
            self.sizes.setdefault(name, []).append((float(finite.mean()) if finite.numel() else 0.0, samples))
            if finite.numel() < tensor.numel():
                self._not_finite(name, tensor)

    def _not_finite(self, name: str, x: Tensor) -> None:
        nan = x.isnan()
        rows = nan.reshape(len(x), -1).any(1) if x.ndim and len(x) == self.samples else nan.any().expand(self.samples)
        if nan.any():
            self.nan[name] = self.nan.get(name, 0) + int(rows.sum())
        if nan.all():
            self.left_out[name] = "the float model itself gives only NaN: check the bad cases and the model"
        if x.isinf().any():
            self.infinite.add(name)

    @property
    def findings(self) -> list[Finding]:
        """Outputs that are not compared or not finite in the float model. Raises DataError if none can be compared."""
        texts = [f"output {name} is not compared: {why}" for name, why in sorted(self.left_out.items())]
        found = [Finding("sensitivity", "info", text) for text in texts]
        if not self.sizes.keys() - self.left_out.keys():
            raise DataError(
                f"Float outputs are compared, but got none: {'; '.join(texts) or 'the model gives no tensor'}. "
                "Take other bad cases, or cut the model before the operators that make these outputs."
            )
        for name in sorted(self.nan.keys() - self.left_out.keys()):
            text = f"output {name} is NaN in the float model already, in {self.nan[name]} samples: ignored there"
            found.append(Finding("sensitivity", "check", text))
        for name in sorted(self.infinite - self.left_out.keys()):
            text = f"output {name} is infinite in the float model already: a mask or an overflow, not a quantizer"
            found.append(Finding("sensitivity", "info", text))
        return found

    def add(self, variant: int, outputs: dict[str, Tensor]) -> None:
        """Take a variant's outputs on the same chunk. An output whose shape differs from float is left out."""
        for name, x in self.float_outputs.items():
            y = outputs.get(name, x)
            if x.shape != y.shape:
                self.left_out[name] = "its shape depends on the data"
                continue
            x, y = _comparable(x, y)
            self.values[variant].setdefault(name, {})[self.chunk] = self._by_sample(x, y).cpu()

    def _by_sample(self, x: Tensor, y: Tensor) -> Tensor:
        """One distance per sample; an output without a sample axis has the same distance for every sample."""
        if x.ndim and len(x) == self.samples:
            return distance(self.metric, *((x, y) if x.ndim > 1 else (x[:, None], y[:, None])))
        if self.metric == "KL":  # without a batch axis in front, which would change the axis of the softmax
            value = divergence(x, y)
            return torch.full((self.samples,), math.nan if value is None else value, dtype=torch.float64)
        return distance(self.metric, x[None], y[None]).mean().expand(self.samples)

    def plain(self) -> dict[str, Any]:
        """Return what it has collected as plain data, for another process."""
        values = [{n: {k: x.tolist() for k, x in chunks.items()} for n, chunks in row.items()} for row in self.values]
        rest = {"sizes": self.sizes, "left_out": self.left_out, "nan": self.nan, "infinite": sorted(self.infinite)}
        return {"values": values, **rest}

    def take(self, data: Mapping[str, Any]) -> None:
        """Take in what `plain` gives for other variants and chunks; what it says of the float outputs is the same."""
        for own, row in zip(self.values, data["values"], strict=True):
            for name, chunks in row.items():
                found = {int(k): torch.tensor(values, dtype=torch.float64) for k, values in chunks.items()}
                own.setdefault(name, {}).update(found)
        self.sizes = {name: [(size, samples) for size, samples in sizes] for name, sizes in data["sizes"].items()}
        self.left_out.update(data["left_out"])
        self.nan, self.infinite = dict(data["nan"]), set(data["infinite"])

    @property
    def complete(self) -> bool:
        """Whether every variant has the distances of every output that is compared, on all chunks."""
        names = self.sizes.keys() - self.left_out.keys()
        return all(len(row.get(name, ())) == len(self.sizes[name]) for row in self.values for name in names)

    def _distances(self, variant: int) -> dict[str, Tensor]:
        """Distances of all samples, by output."""
        kept = {name: chunks for name, chunks in self.values[variant].items() if name not in self.left_out}
        return {name: torch.cat([chunks[k] for k in sorted(chunks)]) for name, chunks in kept.items()}

    def merged(self, variant: int) -> Tensor:
        """Merged badness of each sample [samples]; a scalar 0 if no output is compared."""
        merged = torch.zeros(())
        for name, found in self._distances(variant).items():
            merged = merged + badness(self.metric, found) / self._unit(name)
        return merged

    def result(self, variant: int) -> tuple[float, float, dict[str, float]]:
        """Merged score, its standard deviation over the samples, and the plain metric of each output."""
        plain = {name: float(found.mean()) for name, found in self._distances(variant).items()}
        merged = self.merged(variant)
        if merged.ndim == 0:
            return 0.0, 0.0, plain
        score = float(merged.mean())
        if math.isnan(score):  # a NaN counts as the worst score
            return math.inf, 0.0, {n: math.inf if math.isnan(v) else v for n, v in plain.items()}
        spread = float(merged.std()) if len(merged) > 1 else 0.0
        return score, spread if math.isfinite(spread) else 0.0, plain

    def _unit(self, name: str) -> float:
        if self.metric in ("Cosine", "SQNR", "KL"):
            return 1.0
        total = sum(n for _, n in self.sizes[name])
        size = sum(s * n for s, n in self.sizes[name]) / max(total, 1)
        return (size**2 if self.metric == "MSE" else size) or 1.0


def _comparable(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Both, with 0 where they are the same infinity (a mask in the outputs) or where x is NaN: these count as equal."""
    if math.isfinite(float(x.sum())):
        return x, y
    same = ((x == y) & x.isinf()) | x.isnan()
    return x.masked_fill(same, 0.0), y.masked_fill(same, 0.0)


def disagreement(
    got: dict[str, Tensor], wanted: dict[str, Tensor], plain: dict[str, Tensor], nothing: float = 1e-3
) -> float:
    """Largest |got - wanted| / |wanted - plain| of the outputs (Euclidean norms, divisor at least `nothing` |plain|).

    `plain` are the float outputs: the ratio compares the difference between two ways of computing the same outputs
    with the change that quantization makes to them.
    """
    worst = 0.0
    for name, tensor in got.items():
        if not tensor.is_floating_point() or name not in wanted or wanted[name].shape != tensor.shape:
            continue
        if plain[name].shape != tensor.shape:
            continue
        a, b, c = (t.double().nan_to_num() for t in (tensor, wanted[name], plain[name]))
        worst = max(worst, float((a - b).norm()) / max(float((b - c).norm()), nothing * float(c.norm()), 1e-30))
    return worst
