"""The calibration method of single operators, by the error of the outputs; no weight is changed."""

__all__ = ["observers", "output_error"]
