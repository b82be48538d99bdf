"""What is tuned: a task of model, data and metric, built-in tasks, and the digests that identify a user's task."""

__all__ = [
    "content_digest",
    "details",
    "digits",
    "dual",
    "early_stop",
    "exposure",
    "identity",
    "loading",
    "onnx_model",
    "perception",
    "sequences",
    "task",
    "temporal",
]
