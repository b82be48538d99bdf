"""Accuracy debugging as in Horizon's tuning guide: bad cases, layer comparison, sensitivity, checks, advice.

The packages in the order of their dependencies; `badcases`, `layers`, `sensitivity` and `checks` are independent:
    measures     the tables that hold the results, and the distances between float and quantized values
    badcases     finds the samples on which the quantized model differs most from float
    layers       compares every operator call on these samples, float against quantized
    sensitivity  switches on every quantizer alone and measures how far the outputs move from float
    checks       finds problems of a qconfig or a calibration without comparing outputs
    advice       derives from all of these what to change, and at which stage QAT fails
"""

__all__ = ["advice", "badcases", "checks", "layers", "measures", "sensitivity"]
