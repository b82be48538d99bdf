"""Quantization-aware training: the loop, its states, checkpoints, and which operator went bad first."""

__all__ = ["checkpoint", "qat"]
