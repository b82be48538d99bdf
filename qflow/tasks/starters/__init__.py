"""What `qflow init` writes: for each kind a task as it is meant to be written, which runs as it is."""

__all__ = ["classification", "detection", "files", "module"]
