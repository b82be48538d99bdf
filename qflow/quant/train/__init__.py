"""Quantization-aware training: the loop, its state, its checkpoints, and the first bad operator when it diverges."""

__all__ = ["checkpoint", "qat"]
