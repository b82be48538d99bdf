"""Output for people: the console, the files of a trial and of an analysis, pictures, the HTML page."""

__all__ = ["analysis_files", "console", "cost_picture", "files"]
