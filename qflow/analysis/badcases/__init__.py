"""The samples on which the quantized model differs most from float: search, state of a search, files."""

__all__ = ["files", "find", "looks", "state"]
