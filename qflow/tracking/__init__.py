"""The edge to MLflow: runs, tables, the model registry, and the stores on disk.

`mlflow_tracker`, `registry` and `views` are the only code that talks to mlflow; importing this package does
not import it (1.6 s), opening a tracker does.
"""
