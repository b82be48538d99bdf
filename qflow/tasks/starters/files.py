"""The files of a new task, by kind: the modules beside this one, word for word."""

from __future__ import annotations

from pathlib import Path

KINDS = ("classification", "detection", "module")
PICTURES = 400  # of the example for detection
EXAMPLE = "example"


def files_of(kind: str) -> dict[str, bytes]:
    """Name of each file, below the working folder, and its content. `kind` is one of KINDS."""
    here = Path(__file__).parent
    found = {
        "my_task.py": (here / f"{kind}.py").read_bytes(),
        "conf/task/mine.yaml": (here / f"{kind}.yaml").read_bytes(),
        "test_my_task.py": (here / "test_my_task.py").read_bytes(),
    }
    if kind == "detection":
        from qflow.tasks.detection.example import example_files  # it imports NumPy and Pillow

        found |= {f"{EXAMPLE}/{name}": content for name, content in example_files(PICTURES)}
    return found
