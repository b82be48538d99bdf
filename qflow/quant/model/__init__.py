"""The prepared model: fusion plan, quantizers in place, one run at a time, calibration, its state."""

__all__ = [
    "calibrate",
    "graph_at_shape",
    "model_state",
    "plan",
    "prepare",
    "quantized_model",
    "run",
    "runtime",
    "weighted",
]
