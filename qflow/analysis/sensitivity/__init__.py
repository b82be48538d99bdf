"""Sensitivity: how far the outputs move when one quantizer is switched on alone, measured or estimated."""

__all__ = ["candidates", "measure", "point", "sensitive_ops"]
