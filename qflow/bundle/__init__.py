"""What leaves of a trial as files: fetched from a run, a model version, a folder or an archive, verified, read as data.

Nothing in these files decides what code runs (targets.py), and nothing is unpickled.
"""

__all__ = ["bounded", "example", "files", "source", "stored", "targets", "texts", "write"]
