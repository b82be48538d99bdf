"""Replay of a captured forward pass under changed quantizers, to see what each change does to the outputs."""

__all__ = ["backward", "capture", "captured_ops", "floats", "fused", "packed", "replay", "samples", "widen"]
