"""What a model computes: tracing by example, the recorded operators, their names and call sites."""

__all__ = ["binding", "calling", "decompose", "masks", "ops", "order", "sites", "tape", "trace", "tracer"]
