"""The tables that hold the results of an analysis, and the distances between float and quantized values."""

__all__ = ["distances", "layer_metrics", "metrics", "tables"]
