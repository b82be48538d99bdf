"""Equalization: factors on channels that leave the float function as it is."""

__all__ = ["channel_groups", "channels", "equalize"]
