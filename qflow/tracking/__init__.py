"""MLflow runs, artifacts, the model registry and saved views.

No other package imports mlflow. It takes 1.6 s to import, so that it is imported only when a tracker is opened.
"""

__all__ = [
    "artifacts",
    "carried",
    "connect",
    "datasets",
    "ended",
    "lease",
    "limits",
    "mlflow_tracker",
    "model_files",
    "patience",
    "registry",
    "run_records",
    "views",
]
