"""Layer-by-layer comparison: every operator call on the bad cases, float against quantized."""

__all__ = ["compare", "rows", "text"]
