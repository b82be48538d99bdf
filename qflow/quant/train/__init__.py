"""Quantization-aware training: the loop, its state, checkpoints, losses and rates; the first bad operator."""

__all__ = [
    "checkpoint",
    "groups",
    "learned_scales",
    "loss",
    "objective",
    "qat",
    "qat_state",
    "report",
    "schedule",
    "teacher",
]
