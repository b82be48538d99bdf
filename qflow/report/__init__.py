"""Output for people: the console, the files of a trial and of an analysis, pictures, the HTML page."""

__all__ = [
    "analysis_files",
    "analysis_page",
    "console",
    "cost_picture",
    "files",
    "page",
    "study_page",
    "study_record",
]
