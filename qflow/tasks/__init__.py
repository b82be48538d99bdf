"""What is tuned: a task of model, data and metric, built-in tasks, and the digests that identify a user's task."""

__all__ = [
    "content_digest",
    "deployed",
    "details",
    "detection",
    "digits",
    "dual",
    "early_stop",
    "exposure",
    "files",
    "identity",
    "images",
    "loading",
    "metrics",
    "onnx_model",
    "perception",
    "sequences",
    "starters",
    "task",
    "temporal",
]
