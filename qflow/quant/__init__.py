"""The fake-quant engine on plain PyTorch: it prepares, calibrates, runs, replays and trains a quantized model.

Each subpackage imports only from those that are listed before it:
    trace    records one forward pass of a model, operator by operator
    values   observers turn values into scales, fake quantizers turn scales into quantized values
    model    the prepared model: fusion plan, quantizers, calibration, and the proof that the float graph is unchanged
    replay   runs captured operators again under one changed quantizer, to measure sensitivities
    train    quantization-aware training

In these files "the plugin" is Horizon's quantization plugin for PyTorch (horizon_plugin_pytorch), and "the guide" is
Horizon's tuning guide.
"""

__all__ = ["model", "replay", "trace", "train", "values"]
