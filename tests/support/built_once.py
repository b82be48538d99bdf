"""What every test finds alike and takes seconds to build: the networks of the small tasks, and empty databases.

Each is built by qflow's own code the first time a session needs it, kept in a folder, and read from there by later
tests and by the commands that they start. What comes from the folder is what was built, bit for bit. Commands in new
interpreters (commands/test_tune.py) build all of it themselves, and so do tests within `built_anew`.
"""

import hashlib
import os
import shutil
import sqlite3
from contextlib import closing, contextmanager
from pathlib import Path

import torch

from qflow.core.store import build_aside, sqlite_path
from qflow.search import database
from qflow.tasks import digits, temporal
from qflow.tracking import connect

PLACES = [
    (digits, "_trained"), (temporal, "_trained"), (connect, "_create_database"), (database, "_create"),
]  # fmt: skip
OWN = [getattr(*place) for place in PLACES]
folder = None
"""Where this session keeps what it has built; None before `build_once`."""


def build_once(place):
    """Keep what is built from now on in the folder `place`, which processes may share."""
    global folder
    folder = Path(place)
    for (module, name), build in zip(PLACES, OWN, strict=True):
        setattr(module, name, _trained_once(build) if name == "_trained" else _created_once(build))


@contextmanager
def built_anew():
    """Everything is built by qflow itself in this block."""
    kept = [getattr(*place) for place in PLACES]
    for (module, name), build in zip(PLACES, OWN, strict=True):
        setattr(module, name, build)
    try:
        yield
    finally:
        for (module, name), build in zip(PLACES, kept, strict=True):
            setattr(module, name, build)


def _trained_once(train):
    def trained(*arguments):
        file = folder / f"{train.__module__}-{_digest(arguments)}.pt"
        if not file.exists():
            aside = file.with_suffix(f".{os.getpid()}")
            torch.save(train(*arguments), aside)
            aside.replace(file)
        return torch.load(file, weights_only=False)

    return trained


def _digest(arguments):
    """What a training depends on: the class of the network, the values of its samples, and numbers."""
    found = hashlib.sha256()
    for value in arguments:
        for part in getattr(value, "tensors", [value]):
            found.update(part.numpy().tobytes() if isinstance(part, torch.Tensor) else repr(part).encode())
    return found.hexdigest()[:16]


def _created_once(create):
    def created(url):
        kept = folder / f"{create.__module__}.db"
        build_aside(kept, create)
        shutil.copyfile(kept, sqlite_path(url))
        if create.__module__ == connect.__name__:
            _move_default_experiment(sqlite_path(url))

    return created


def _move_default_experiment(file):
    """MLflow writes the folder of artifacts into the one experiment of a new database."""
    with closing(sqlite3.connect(file)) as found, found:
        place = connect._address(file.parent / "artifacts")
        found.execute("UPDATE experiments SET artifact_location = ? WHERE experiment_id = 0", (f"{place}/0",))
