"""The prepared model: its fusion plan, its quantizers, how one forward pass runs, its calibration and its state."""

__all__ = [
    "calibrate",
    "graph_at_shape",
    "leaf",
    "model_state",
    "module_names",
    "plan",
    "prepare",
    "quantized_model",
    "run",
    "runtime",
    "sequences",
    "shared_modules",
    "temporal",
    "temporal_state",
    "weighted",
]
