"""Reconstruction: the int8 codes of the weights are learned so that layers and blocks give their float results.

Second-order rounding (rounding.py) keeps the output of each operator by least squares. This goes on from its codes:
AdaRound (learned_codes.py) layer by layer, through the activation function that follows, on the inputs of the quantized
network and with the result of the float network as target; then whole blocks (regions.py), where the layers alone leave
more error than the block has with float weights, while activations are quantized at random (walk.py). These are BRECQ
(Li et al., ICLR 2021, arXiv 2102.05426), without its Fisher weights, and QDrop. With the samples in chunks C_i:

    minimise   sum |y_quantized - y_float|^2 / sum |y_float|^2 + a regulariser     on all C_i but each fourth
    keep       the codes of least error, of the present ones and those on the way   on each fourth C_i

A region is left alone if float weights would have no less error (`LEFT`): what remains comes from its inputs. Training
stops early when not even weights between two codes have less error than the best codes so far. Regions are learned in
order of execution, and each sees the codes that those before it have found.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from qflow.quant.model.quantized_model import QuantizedModel
from qflow.quant.replay.captured_ops import Weights
from qflow.repair.base.operators import leaves
from qflow.repair.weights.learned_codes import LearnedCodes
from qflow.repair.weights.regions import Region
from qflow.repair.weights.rounding import write
from qflow.repair.weights.walk import LEAST, Chunk, Walk

ITERATIONS = 300
"""Training iterations of a region at most; one takes a chunk of samples."""
RATE = 0.2
"""Learning rate of Adam for V."""
STRENGTH = 30.0
"""Weight of the regulariser, in units of the (squared) error that the region starts with."""
WARM = 0.2
"""Share of the iterations without a regulariser."""
BETA = (20.0, 2.0)
"""The regulariser's exponent after these, and at the end."""
LOOK = 20
"""Iterations between two looks at the samples that decide."""
PATIENCE = 3
"""Training stops after so many looks in a row at which weights between two codes had no less error than codes have."""
LEFT = 1.0
"""A region is learned if its (squared) error is more than so many times that with float weights."""

Codes = dict[str, Tensor]


@dataclass(frozen=True)
class Reconstructed:
    """New codes of the weights of a region, as float weights that have them.

    Errors are sqrt(sum |y_quantized - y_float|^2 / sum |y_float|^2) of its result, on the samples that decide.
    """

    weights: Mapping[str, Tensor]
    before: float
    after: float
    possible: float
    """With float weights: what the quantized activations cost."""
    moved: float
    """Share of the codes that have changed."""
    by_layer: int
    """Iterations layer by layer."""
    as_block: int
    """Iterations of the block as a whole."""

    def __str__(self) -> str:
        block = f" and {self.as_block} as a block" if self.as_block else ""
        return (
            f"error of its output {self.before:.3g} -> {self.after:.3g} (float weights: {self.possible:.3g}), "
            f"{self.moved:.1%} of the codes moved in {self.by_layer} iterations by layer{block}"
        )


def reconstruct(
    prepared: QuantizedModel,
    model: nn.Module,
    chunks: Sequence[Chunk],
    regions: Sequence[Region],
    only: Collection[str] | None = None,
    bits: int = 8,
    seed: int = 0,
) -> tuple[dict[str, Reconstructed], int]:
    """Learn the codes of `regions` (all, or those named) and write them; return what was changed, and its cost.

    `prepared` is calibrated, in eval mode and has the codes to start from; `model` is the float model with the weights
    that the network shall compute with, `chunks` are captured on it (walk.py). Fewer `bits` keep to every
    2^(8 - bits)-th code, as a stress test. The cost is in samples run through the model, by multiply-accumulates; a
    backward pass counts as two forward passes. Regions that are not better are not in the result, and stay.
    """
    walk = Walk(prepared, chunks)
    learner = _Learner(prepared, model, walk, bits, seed)
    found: dict[str, Reconstructed] = {}
    with torch.no_grad(), prepared.quantized():
        for region in regions:
            if only is None or region.name in only:
                new = learner.region(region)
                if new is not None:
                    found[region.name] = new
    for chunk in chunks:
        chunk.plain, chunk.quantized = {}, {}
    return found, round(walk.forwards)


class _Learner:
    """Learns the codes of a region from where the walk stands, and writes the best ones into the prepared model."""

    def __init__(self, prepared: QuantizedModel, model: nn.Module, walk: Walk, bits: int, seed: int) -> None:
        self.prepared, self.walk, self.bits, self.seed = prepared, walk, bits, seed
        self.leaves, self.originals = leaves(prepared), dict(model.named_modules())
        every = min(LEAST, len(walk.chunks))
        self.decide = walk.chunks[every - 1 :: every]
        self.fit = [chunk for n, chunk in enumerate(walk.chunks) if n % every != every - 1]
        self.generator = torch.Generator()

    def region(self, region: Region) -> Reconstructed | None:
        """A layer, or the layers of a block and then the block; None if nothing was better."""
        self.generator.manual_seed(self.seed + region.start)
        self.walk.advance(region.start)
        start, by_layer, as_block = self._learned(region), 0, 0
        if region.layers:
            place = self.walk.place()
            for layer in region.layers:
                self.walk.advance(layer.start, layer.end + 1)
                by_layer += self._learn(layer, drop=False)
            self.walk.back(place)
        self.walk.advance(region.start, region.end + 1)
        before = self._error(self.decide, region, _fixed(start))
        possible = self._error(self.decide, region, {name: one.original() for name, one in start.items()})
        if region.layers:
            if not self._error(self.decide, region, {}) < before:  # each layer is better, all of them are not
                self._write(start, {name: one.codes for name, one in start.items()})
            as_block = self._learn(region, drop=True)
        else:
            by_layer = self._learn(region, drop=False)
        now = self._learned(region)
        changed = [one.codes != start[name].codes for name, one in now.items()]
        if not any(bool(each.any()) for each in changed):
            return None
        after = self._error(self.decide, region, {})
        moved = float(torch.cat([each.flatten() for each in changed]).double().mean())
        weights = {name: self.leaves[name].weight.detach().clone() for name in region.weights}
        return Reconstructed(weights, before**0.5, after**0.5, possible**0.5, moved, by_layer, as_block)

    def _learn(self, region: Region, drop: bool) -> int:
        """Train the codes of a region whose float result is held, write the best; return the iterations."""
        learned = self._learned(region)
        least = self._error(self.decide, region, _fixed(learned))
        possible = self._error(self.decide, region, {name: one.original() for name, one in learned.items()})
        if not least > LEFT * possible:  # also if one of them is not finite
            return 0
        unit = self._error(self.fit, region, _fixed(learned))
        adam = torch.optim.Adam([one.v for one in learned.values()], lr=RATE)
        best, waited, waiting = {name: one.codes for name, one in learned.items()}, 0, list[int]()
        for iteration in range(1, ITERATIONS + 1):
            waiting = waiting or torch.randperm(len(self.fit), generator=self.generator).tolist()
            self._gradients(region, learned, self.fit[waiting.pop()], unit, iteration / ITERATIONS, drop)
            adam.step()
            if iteration % LOOK and iteration < ITERATIONS:
                continue
            codes = {name: one.hard() for name, one in learned.items()}
            error = self._error(self.decide, region, _fixed(learned, codes))
            if error < least:
                least, best = error, codes
            between = self._error(self.decide, region, {name: one.soft() for name, one in learned.items()})
            waited = 0 if between < least else waited + 1
            if waited == PATIENCE:
                break
        self._write(learned, best)
        return iteration

    def _gradients(
        self, region: Region, learned: Mapping[str, LearnedCodes], chunk: Chunk, unit: float, done: float, drop: bool
    ) -> None:
        """Set the gradients of V for one chunk; `done` is the share of the iterations so far."""
        target, past = chunk.plain[region.end][0], max(0.0, (done - WARM) / (1 - WARM))
        beta = BETA[0] + (BETA[1] - BETA[0]) * past
        with torch.enable_grad():
            weights = {name: one.soft() for name, one in learned.items()}
            result = self.walk.result(chunk, region, weights, self.generator if drop else None)
            loss = (result - target).square().sum() / (float(target.square().sum()) or 1.0)
            undecided = torch.stack([one.undecided(beta) for one in learned.values()]).mean()
            loss = loss + (STRENGTH * unit if past else 0.0) * undecided
            gradients = torch.autograd.grad(loss, [one.v for one in learned.values()])
        for one, gradient in zip(learned.values(), gradients, strict=True):
            one.v.grad = gradient

    def _learned(self, region: Region) -> dict[str, LearnedCodes]:
        return {
            name: LearnedCodes(
                self.leaves[name],
                self.prepared.weights[name],
                self.originals[name].weight,
                self.bits,  # type: ignore[arg-type]
            )
            for name in region.weights
        }

    def _write(self, learned: Mapping[str, LearnedCodes], codes: Codes) -> None:
        for name, one in learned.items():
            write(self.prepared, name, self.leaves[name], one.float_weight(codes[name]))

    def _error(self, chunks: Sequence[Chunk], region: Region, weights: Weights) -> float:
        """Sum |y_quantized - y_float|^2 / sum |y_float|^2, with these weights or the present ones."""
        wrong = size = 0.0
        with torch.no_grad():
            for chunk in chunks:
                target = chunk.plain[region.end][0].double()
                wrong += float((self.walk.result(chunk, region, weights) - target).square().sum())
                size += float(target.square().sum())
        return wrong / (size or 1.0)


def _fixed(learned: Mapping[str, LearnedCodes], codes: Codes | None = None) -> Weights:
    """Weights with these codes, or with those that the weights have had at first."""
    return {name: one.fixed(one.codes if codes is None else codes[name]) for name, one in learned.items()}
