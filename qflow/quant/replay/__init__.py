"""Operators of a captured forward pass, run again under changed quantizers, and what a change costs downstream."""

__all__ = ["backward", "capture", "captured_ops", "fused", "replay", "samples", "widen"]
