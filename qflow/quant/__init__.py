"""The fake-quant engine on plain PyTorch: prepare, calibrate, run quantized, replay, train.

In order, each above those before it:
    trace    what a model computes: one forward pass, recorded operator by operator
    values   observers and fake quantizers: from values to scales, from scales to quantized values
    model    the prepared model: fusion plan, quantizers in place, calibration, proof that the float graph is unchanged
    replay   captured operators run again under one changed quantizer, for sensitivities
    train    quantization-aware training
"""

__all__ = ["model", "replay", "trace", "train", "values"]
