"""Quantization-aware training: the loop, its state, checkpoints, losses and rates; the first bad operator."""

__all__ = ["checkpoint", "groups", "loss", "qat", "qat_state", "schedule"]
