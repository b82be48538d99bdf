"""Repair: float weights and calibration settings that lose less in int8, before any operator is raised to int16.

`base` says what a step is and what decides about it, `equalization`, `calibration` and `weights` are the steps, `run`
tries them one after the other.
"""

__all__ = ["base", "calibration", "run", "steps"]
