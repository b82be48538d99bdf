"""Bad cases: the samples on which the calibrated model differs most from float."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from torch import nn

from qflow.analysis.badcases.files import BadcaseInputs
from qflow.analysis.badcases.looks import Seen
from qflow.analysis.badcases.search import Search
from qflow.analysis.badcases.state import read_state, write_state
from qflow.analysis.measures.metrics import CUSTOM, Custom, metric_names
from qflow.analysis.measures.tables import BadcaseTable
from qflow.core.errors import ConfigError
from qflow.quant.model.quantized_model import QuantizedModel

COMPARE = ("fair", "raw")
POOL = 1024


@dataclass(frozen=True)
class Elsewhere:
    """Looks at the batches of a search that other processes take, in the order of the batches."""

    steps: int
    """Number of batches of the search."""
    looks: Callable[[int], Iterator[Seen]]
    """Yields the looks at the batches after the first so many. It may end early: the rest is then searched here."""


def find_badcases(
    model: nn.Module,
    prepared: QuantizedModel,
    batches: Iterable[tuple[Any, int]],
    *,
    metric: str = "L1",
    count: int = 16,
    on_step: Callable[[int], None] = lambda step: None,
    num_steps: int | None = None,
    custom: Custom | None = None,
    compare: str = "fair",
    top: int = 8,
    pool: int | None = None,
    inputs: BadcaseInputs | None = None,
    state: Path | None = None,
    identity: str = "",
    save_every: int = 16,
    elsewhere: Elsewhere | None = None,
) -> BadcaseTable:
    """Compare float and calibrated outputs over `batches` of (model inputs, size), `num_steps` of them if given.

    Memory does not grow with the number of samples: kept are means, the `top` worst of each output and metric, and
    a pool of candidates for the worst over all outputs. `metric` chooses the `count` bad cases: one of
    `COMPARISONS`, or `custom` with the user's own function. By `compare="fair"` they are those of the largest sum
    over outputs of distance / mean distance of the output; by `"raw"`, as in the plugin, those of the worst number
    in any output. Raw is exact always. Fair is exact up to 2 x `pool` samples (`pool` is 1024, or `count` if more),
    and beyond for as many samples as worst_samples.py can prove; if these are fewer than `count`, a finding says so.

    Operators that change the order of values (topk, sort, argmax, ...) follow the float indices, so that outputs can
    be compared element by element. `inputs` collects the inputs of bad cases on the way.

    With `state` the search is saved to that file every `save_every` steps and at the end. A second call on the same
    batches skips the finished ones and returns the same table, bit for bit. `identity` names data and model: a state
    of another identity is refused. With `elsewhere` other processes look at all batches but the first, with the same
    result; `inputs` and `num_steps` are then not used.

    Raises DataError if there is no data or no floating output to compare, ConfigError for settings that do not
    exist and for a state of another search.
    """
    # Long: signature and docstring take half of the lines.
    pool = max(POOL, count) if pool is None else pool
    settings = _checked(metric, count, num_steps, custom, compare, top, pool, state, identity)
    search = Search(model, prepared, custom, max(top, count if compare == "raw" else 1), pool)
    done = search.resume(read_state(state, settings)) if state is not None else 0
    if num_steps is not None and num_steps < done:
        raise ConfigError(
            f"A bad-case search continues its state from step {done}, but got num_steps {num_steps}. Raise it."
        )
    step = 0
    save = None if state is None else functools.partial(write_state, state, settings)
    with torch.no_grad(), prepared.quantized():
        stream = enumerate(itertools.islice(batches, num_steps), 1)
        wanted = functools.partial(search.wanted, metric, count, compare)
        steps = _shared(search, stream, done, elsewhere) if elsewhere else _steps(search, stream, done, inputs, wanted)
        for step in steps:
            if save is not None and step > done and step % save_every == 0:
                save(search.state_dict(step))
            on_step(step)
    if step < done:
        raise _other_data(search.samples, done, f"the end after {step}")
    if save is not None and step > done:
        save(search.state_dict(step))
    table = search.table(metric, count, compare, top)
    if inputs is not None:
        inputs.finish(table)
    return table


def _steps(
    search: Search,
    batches: Iterator[tuple[int, tuple[Any, int]]],
    done: int,
    inputs: BadcaseInputs | None,
    wanted: Callable[[], set[int]],
) -> Iterator[int]:
    """Search the batches after the first `done`; of those, only the inputs are collected. Yields each finished step."""
    seen = 0
    for step, (batch, size) in batches:
        if step > done:
            search.add(batch, size)
        if inputs is not None:
            inputs.update(batch, seen, size, wanted())
        seen += size
        if step == done and seen != search.samples:
            raise _other_data(search.samples, done, f"{seen}")
        yield step


def _shared(
    search: Search, batches: Iterator[tuple[int, tuple[Any, int]]], done: int, elsewhere: Elsewhere
) -> Iterator[int]:
    """Search the batches after the first `done` elsewhere; the first of all here, as it decides what is compared."""
    step = done
    if done:
        yield done
    else:
        for step, (batch, size) in itertools.islice(batches, 1):
            search.add(batch, size)
            yield step
    for seen in elsewhere.looks(step):
        search.take(seen)
        step += 1
        yield step
    if step < elsewhere.steps:
        for position, (batch, size) in batches:
            if position > step:
                search.add(batch, size)
                yield position


def _other_data(samples: int, steps: int, got: str) -> ConfigError:
    return ConfigError(
        f"A bad-case state continues on the same batches, {samples} samples in {steps} steps, but got {got}. "
        "Give the same data or another state."
    )


def _checked(
    metric: str,
    count: int,
    num_steps: int | None,
    custom: Custom | None,
    compare: str,
    top: int,
    pool: int,
    state: Path | None,
    identity: str,
) -> dict[str, str]:
    """What a state must share with this search. Raises ConfigError for settings that do not exist."""
    names = metric_names(custom)
    if metric not in names:
        way = " Give the function as custom=Custom(function, order)." if metric == CUSTOM else ""
        raise ConfigError(f"A comparison metric is one of {', '.join(names)}, but got {metric!r}.{way}")
    if compare not in COMPARE:
        raise ConfigError(f"Outputs are compared {' or '.join(COMPARE)}, but got {compare!r}.")
    for name, value in (("count", count), ("num_steps", num_steps), ("top", top), ("pool", pool)):
        if value is not None and (not isinstance(value, Integral) or value < 1):
            raise ConfigError(f"A bad-case search has at least one {name}, but got {value!r}. Give a whole number.")
    if pool < count:
        raise ConfigError(f"A pool holds all bad cases, count {count}, but got {pool}. Raise pool.")
    if state is not None and not identity:
        raise ConfigError("A state belongs to one model and data, but got no identity for them. Name them.")
    own = "none" if custom is None else f"{custom.order} {getattr(custom.function, '__qualname__', 'custom')}"
    kept = max(top, count if compare == "raw" else 1)
    return {"identity": identity, "own metric": own, "top": str(kept), "pool": str(pool)}
