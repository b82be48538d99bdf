"""From values to scales (observers) and from scales to quantized values (fake quantizers)."""

__all__ = ["fake_quant", "observer", "precision"]
