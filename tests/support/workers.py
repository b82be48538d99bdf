"""What workers do in the tests of executors, and whether a process still runs."""

import json
import os
import time
from pathlib import Path


def make(shared):
    """What the workers of these tests do."""
    start = shared["start"]

    def handle(task):
        time.sleep(task.get("seconds", 0))
        if (code := task.get("kill")) is not None and not os.path.exists(task.get("once", "")):
            if "once" in task:
                open(task["once"], "w").close()
            os.kill(os.getpid(), code)
        if "exit" in task:
            os._exit(task["exit"])
        return {"sum": start + task.get("add", 0), "process": os.getpid()}

    return handle


def running(process):
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    with open(f"/proc/{process}/stat") as file:
        return file.read().rpartition(")")[2].split()[0] != "Z"


def make_writing(shared):
    """As `make`, and each task writes a file with what texts lie in the cache folder."""
    handle = make(shared)

    def written(task):
        (Path(task["folder"]) / "part").mkdir()
        found = [file.read_text() for file in Path(shared["cache"]).rglob("*.txt")]
        (Path(task["folder"]) / "part" / "found.json").write_text(json.dumps(found))
        return {**handle(task), "cache": shared["cache"]}

    return written


def make_meeting(shared):
    """Workers whose tasks wait for each other, and say whether they met and which GPUs CUDA would show them."""

    def met(task):
        here, there, end = Path(task["here"]), Path(task["there"]), time.monotonic() + task["seconds"]
        here.touch()
        while not (found := there.exists()) and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(0.2)  # the other one looks a hundred times a second
        here.unlink()
        return {"met": found, "gpus": os.environ.get("CUDA_VISIBLE_DEVICES")}

    return met
