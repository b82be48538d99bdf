"""Sensitivity: how far the outputs move when one quantizer is switched on alone, measured or estimated."""

__all__ = ["candidates", "measure", "parts", "point", "sensitive_ops"]
