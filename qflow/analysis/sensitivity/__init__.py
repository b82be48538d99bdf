"""Sensitivity: every quantizer switched on alone, measured or estimated."""

__all__ = ["candidates", "measure", "sensitive_ops"]
