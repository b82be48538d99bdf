"""Targets of an export: the files by which a tool chain, or another program, takes over a tuned model."""

__all__ = ["contract", "model", "native", "targets"]
