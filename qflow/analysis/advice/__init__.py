"""Advice: what to change, ordered by expected gain, and at which stage a training goes wrong."""

__all__ = ["advisor", "qat_debug", "text"]
