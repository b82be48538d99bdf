"""Activation checkpointing: what is run again in the backward pass meets the same quantizers under the same names.

torch.utils.checkpoint drops activations and calls the function again during backward, outside the prepared model's
forward (P8). The recomputation gets a run of its own, put back to the operator counts, scopes, scales and batch
norm factors that the checkpointed part began with. Batch norm statistics are updated twice, as in any model.
The hook is checkpoint's own `context_fn`, filled in for whoever leaves it open; without a prepared model's
forward around it checkpoint runs as ever. use_reentrant=True has no such hook and is refused.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.utils.checkpoint as checkpoint

from qflow.core.errors import ModelError
from qflow.quant.model.run import Run, current_run, set_current_run
from qflow.quant.model.runtime import Mode

Contexts = Callable[[], tuple[contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]]]


def contexts_of(run: Run, inner: Contexts) -> Contexts:
    """`context_fn` that adds `run`'s bookkeeping to the user's own `inner`."""

    def contexts() -> tuple[Any, Any]:
        first, again = inner()
        begin: dict[str, Any] = {}

        @contextmanager
        def forward() -> Iterator[None]:
            run.used = {} if run.used is None else run.used
            begin.update(counts=dict(run.counts), scopes=list(run.scopes), used=run.used)
            with first:
                yield

        @contextmanager
        def recomputation() -> Iterator[None]:
            counts, scopes = dict(begin["counts"]), list(begin["scopes"])
            replay = replace(
                run, collect=None, counts=counts, scopes=scopes, depth=0, folded=set(), used=begin["used"], again=True
            )
            before = set_current_run(replay)
            try:
                with again, Mode(replay):
                    yield
            finally:
                set_current_run(before)

        return forward(), recomputation()

    return contexts


def follow_checkpoints() -> None:
    """Fill in checkpoint's `context_fn` from here on; a second call does nothing."""
    original = checkpoint._checkpoint_without_reentrant_generator
    if getattr(original, "qflow", False):
        return

    def generator(
        fn: Any, preserve: bool = True, context_fn: Any = checkpoint.noop_context_fn, *rest: Any, **kw: Any
    ) -> Any:
        run = current_run()
        if run is None:
            yield from original(fn, preserve, context_fn, *rest, **kw)
            return
        steps = original(fn, preserve, contexts_of(run, context_fn), *rest, **kw)
        run.depth += 1  # checkpoint's own tensors are not the user's
        try:
            next(steps)
        finally:
            run.depth -= 1
        try:
            yield
        except BaseException as error:
            steps.throw(error)
            raise
        yield from steps

    class Refusing(checkpoint.CheckpointFunction):
        @classmethod
        def apply(cls, *args: Any, **kwargs: Any) -> Any:
            if current_run() is not None and torch.is_grad_enabled():
                raise ModelError(
                    "Activation checkpointing in a prepared model runs without reentrant autograd, but got "
                    "use_reentrant=True. Pass use_reentrant=False."
                )
            return reentrant.apply(*args, **kwargs)  # type: ignore[no-untyped-call]

    reentrant = checkpoint.CheckpointFunction
    generator.qflow = True  # type: ignore[attr-defined]
    checkpoint._checkpoint_without_reentrant_generator = generator  # type: ignore[assignment]
    checkpoint.CheckpointFunction = Refusing  # type: ignore[misc]


follow_checkpoints()
