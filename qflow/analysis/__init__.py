"""The guide's accuracy debugging: bad cases, layer comparison, sensitivity, checks, advice.

In order; `badcases`, `layers`, `sensitivity` and `checks` know nothing of each other:
    measures     the records (tables), and the distances between float and quantized values
    badcases     the samples on which the quantized model differs most from float
    layers       every operator call on them, float against quantized
    sensitivity  every quantizer alone: what it costs the outputs
    checks       what a qconfig or a calibration shows without a comparison
    advice       from all of these: what to change, and where QAT fails
"""

__all__ = ["advice", "badcases", "checks", "layers", "measures", "sensitivity"]
