"""Activation checkpointing: operators that are recomputed in backward use the same quantizers under the same names.

torch.utils.checkpoint drops activations and calls the function again during backward, outside the forward of the
prepared model. So the recomputation gets a `Run` of its own, which starts from the operator counts and scopes that the
checkpointed part began with, and takes the scales and batch norm factors of the first pass. Batch norm statistics are
updated twice, as in any model with checkpointing. The hook is checkpoint's own `context_fn`, wrapped around the one
that the user passed. Outside the forward of a prepared model, checkpoint runs unchanged. use_reentrant=True has no such
hook and is refused.
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
    """A `context_fn` that wraps the user's own `inner` and keeps `run`'s bookkeeping for the recomputation."""

    def contexts() -> tuple[Any, Any]:
        forward_context, recompute_context = inner()
        begin: dict[str, Any] = {}

        @contextmanager
        def forward() -> Iterator[None]:
            run.used = {} if run.used is None else run.used
            begin.update(counts=dict(run.counts), scopes=list(run.scopes), used=run.used)
            with forward_context:
                yield

        @contextmanager
        def recomputation() -> Iterator[None]:
            counts, scopes = dict(begin["counts"]), list(begin["scopes"])
            recomputing = replace(
                run,
                collect=None,
                counts=counts,
                scopes=scopes,
                depth=0,
                folded=set(),
                used=begin["used"],
                recomputing=True,
            )
            before = set_current_run(recomputing)
            try:
                with recompute_context, Mode(recomputing):
                    yield
            finally:
                set_current_run(before)

        return forward(), recomputation()

    return contexts


def follow_checkpoints() -> None:
    """Wrap the `context_fn` of torch's checkpoint from now on; a second call does nothing."""
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
        run.depth += 1  # the tensor operators of checkpoint itself do not belong to the user's model
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
