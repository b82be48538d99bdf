"""What people read: console, files of a trial and of an analysis, pictures, the page."""

__all__ = ["analysis_files", "console", "cost_picture", "files"]
