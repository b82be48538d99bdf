"""Checks of a qconfig and of a calibration that need no comparison of outputs."""

__all__ = ["calibration_check", "harmless", "mask_check", "model_check", "range_check", "scale_check", "shared_check"]
