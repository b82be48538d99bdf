"""Observers, which turn values into scales, and fake quantizers, which turn scales into quantized values."""

__all__ = ["fake_quant", "grid", "half", "observer", "precision"]
