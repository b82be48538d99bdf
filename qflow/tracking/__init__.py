"""MLflow runs, artifacts, the model registry and saved views.

The only home of mlflow. Importing this package does not import it (1.6 s); opening a tracker does.
"""

__all__ = ["mlflow_tracker", "registry", "views"]
