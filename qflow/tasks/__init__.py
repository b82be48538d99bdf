"""What is tuned: model, data and metric; the digests that identify a user's own."""

__all__ = ["content_digest", "digits", "dual", "early_stop", "exposure", "identity", "onnx_model", "perception", "task"]
