"""The tables that hold the results of an analysis, the overrides that apply them, and distances between values."""

__all__ = ["advice", "distances", "kl_divergence", "layer_metrics", "metrics", "override", "pair_sums", "tables"]
