"""Repair: float weights and calibration settings that lose less in int8, before any operator is raised to int16.

`contract` says what a step is and what the table holds, `measure` decides, `run` tries the steps one after the other.
"""

__all__ = ["contract", "observers", "run", "steps"]
