"""Tracing: one forward pass on an example records the operators of a model, their names and their call sites."""

__all__ = [
    "aliases",
    "binding",
    "calling",
    "compounds",
    "decompose",
    "masks",
    "ops",
    "order",
    "sites",
    "state",
    "tape",
    "trace",
    "tracer",
]
