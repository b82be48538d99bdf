"""What a qconfig or a calibration shows without a comparison: the model check and its findings."""

__all__ = ["calibration_check", "model_check"]
