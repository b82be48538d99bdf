"""Predicts what a choice of precisions costs on the device: latency with its interval, traffic, weight bytes.

The package is not called `cost`, because `qflow.cost` is a function of the library and `python -m qflow.cost` a
command.
"""

__all__ = ["features", "fit", "latency", "measured", "model", "networks", "predictions", "records", "table"]
