"""The built-in detector: day and night pictures made of Fashion-MNIST, its model and its metric."""

__all__ = ["data", "metric", "model"]
