"""qflow: one tracked workflow from a float PyTorch model to the best int8/int16/fp16 mix for Journey 6M."""

__version__ = "0.1.0"
