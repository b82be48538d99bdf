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
