"""Steps that change the float function, so that the quantized model computes what the float model did."""

__all__ = ["bias", "weight_clipping", "weight_steps"]
