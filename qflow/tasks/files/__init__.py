"""Files of the user's data and weights: where they lie, which are used for what, and which cannot be read.

A source is a folder, an archive, or a data set that `datasets` has saved.
"""

__all__ = ["listing", "needs", "onnx_names", "readable", "sources", "weights"]
