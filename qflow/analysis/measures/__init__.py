"""Records of an analysis, and distances between float and quantized values."""

__all__ = ["distances", "layer_metrics", "metrics", "tables"]
