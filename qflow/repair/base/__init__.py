"""What every step works with: its contract, the measurement that judges it, and the operators with a weight."""

__all__ = ["contract", "measure", "operators"]
