"""Metrics that ready tasks bring: of labels (top-1, mIoU), and agreement with the float model, which needs none."""

__all__ = ["agreement", "labels"]
