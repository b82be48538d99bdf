"""Where trials are evaluated: worker processes that get a task as plain data and return a result as plain data."""

__all__ = ["pool", "processes", "ray_nodes", "ray_runtime"]
