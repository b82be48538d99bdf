"""python -m qflow.init [<kind>]: write a task of your own into the working folder, which runs as it is.

It writes `my_task.py`, `conf/task/mine.yaml` and a test; for detection a folder of pictures with annotations besides.
Nothing is overwritten, and if one file cannot be written, none is. Exit code 0: written; 2: a mistake, or a file that
exists.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from qflow.config.command import Result, run_command
from qflow.core.errors import ConfigError
from qflow.core.nearest import did_you_mean

if TYPE_CHECKING:
    from omegaconf import DictConfig

ABOUT = {
    "my_task.py": "the model, its data and its metric: lines with CHANGE are yours to change",
    "conf/task/mine.yaml": "the task as a file, which task=mine chooses",
    "test_my_task.py": "a study on a few samples, for pytest",
}


def main() -> None:
    """Entry point."""
    run_command("init", init)


def init(config: DictConfig) -> Result:
    """Write the files of a kind of task, and say what comes next."""
    from qflow.tasks.starters.files import EXAMPLE, KINDS, files_of

    if config.kind not in KINDS:
        raise ConfigError(
            f"A kind of task is one of {', '.join(KINDS)}, but got {config.kind}.{did_you_mean(config.kind, KINDS)}"
        )
    files = files_of(config.kind)
    write_new(Path.cwd(), files)
    for name, about in ABOUT.items():
        print(f"{'written':<12}{name:<20} {about}")
    if pictures := sum(name.endswith(".jpg") for name in files):
        print(
            f"{'written':<12}{EXAMPLE + '/':<20} {pictures} drawn pictures with COCO annotations: replace them by yours"
        )
    following = "python -m qflow.tune +experiment=int8_int16 task=mine"
    print(f"{'next':<12}{following}")
    return 0, {"kind": config.kind, "written": list(files), "next": following}


def write_new(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write all files below `folder`, or none. Raises ConfigError if one exists, and OSError."""
    taken = [name for name in files if os.path.lexists(folder / name)]
    if taken:
        more = f" and {len(taken) - 1} more" if len(taken) > 1 else ""
        raise ConfigError(f"init writes new files only, but got {taken[0]}{more} in this folder. Take an empty folder.")
    made: list[Path] = []
    try:
        for name, content in files.items():
            file = folder / name
            for parent in reversed([p for p in file.parents if not p.exists()]):
                parent.mkdir()
                made.append(parent)
            with file.open("xb") as stream:
                made.append(file)
                stream.write(content)
    except BaseException:
        for path in reversed(made):
            path.rmdir() if path.is_dir() else path.unlink()
        raise
