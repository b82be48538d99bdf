"""Worker processes on the nodes of a Ray cluster, which may share no folder with the driver.

An actor of Ray holds a place on a node, with its CPUs and its share of a GPU, and passes bytes between the driver and a
worker process beside it (processes.py). So a worker is the same on all executors; if it dies, the actor says how, and
if the actor or its node goes away, the worker ends itself. Files that all tasks need (statistics of the calibration,
repaired weights) go by Ray's object store, once to each node, under names that are digests of their content.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qflow.core.errors import ConfigError, TrialError
from qflow.executor.own_folder import own_folder
from qflow.executor.parcel import packed, unpacked
from qflow.executor.pool import Died, Make
from qflow.executor.processes import ProcessWorker, name_of, started
from qflow.executor.ray_runtime import Runtime

LONGEST = 300  # characters of Ray's reason for the end of an actor


class Holder:
    """What an actor does. Its worker has a folder of its own on the node, which is removed with the worker."""

    folder: Path
    worker: ProcessWorker

    def start(self, plan: str, files: Mapping[str, Any]) -> bytes:
        """Start the worker by a plan (`_plan`), with `files` below its cache folder; return when it is ready."""
        import ray

        asked = json.loads(plan)
        if os.path.isdir(asked["working"]):
            os.chdir(asked["working"])  # paths of a configuration may be relative
        sys.path += [entry for entry in asked["path"] if entry not in sys.path and os.path.exists(entry)]
        contents = ray.get(list(files.values()))
        self.folder = own_folder()
        cache = self.folder / "cache"
        for name, content in zip(files, contents, strict=True):
            (cache / name).parent.mkdir(parents=True, exist_ok=True)
            (cache / name).write_bytes(content)
        self.worker = started(asked["make"], {**asked["shared"], "cache": str(cache)})
        return self._said()

    def handle(self, task: str) -> bytes:
        """Let the worker handle a task; return its answer with its files, in a parcel after one letter.

        The letter is A for an answer, D for the death of the worker, and R for an answer that is refused.
        """
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        self.worker.send(json.dumps({**json.loads(task), "folder": str(folder)}).encode())
        try:
            said = self._said()
            return said if said[:1] == b"D" else b"A" + packed(said[1:], folder)
        except TrialError as error:
            return b"R" + str(error).encode()
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _said(self) -> bytes:
        try:
            return b"A" + self.worker.receive()
        except Died as death:
            self.worker.end()
            return b"D" + str(death).encode()


@dataclass(eq=False)
class NodeWorker:
    """A worker at the other end of an actor."""

    actor: Any
    said: Any
    """Reference to what the actor is about to return."""
    ready: bool = False
    folder: Path | None = None
    """Where the files of its task are to be."""

    def send(self, task: bytes, folder: Path | None) -> None:
        """Hand it a task."""
        self.folder, self.said = folder, self.actor.handle.remote(task.decode())

    def receive(self) -> bytes:
        """Return what it has said. Raises Died, or TrialError for an answer that is refused."""
        import ray

        said, self.said = self.said, None
        try:
            found = ray.get(said)
        except ray.exceptions.RayError as error:
            raise Died(_reason(error)) from None
        if not isinstance(found, bytes) or found[:1] not in (b"A", b"D", b"R"):
            raise Died("an answer of another form")
        kind, content = found[:1], found[1:]
        if kind == b"D":
            raise Died(content.decode(errors="replace")[:LONGEST])
        if kind == b"R":
            raise TrialError(content.decode(errors="replace")[: 2 * LONGEST])
        if not self.ready:
            self.ready = True
            return content
        return unpacked(content, self.folder)

    def end(self) -> None:
        """End the actor; its worker ends itself at that."""
        import ray

        if ray.is_initialized():
            ray.kill(self.actor)


@dataclass
class RayNodes:
    """The backend of a Ray cluster (executor=ray, executor=ray_cluster)."""

    make: Make
    shared: Mapping[str, Any]
    runtime: Runtime
    files: Callable[[], Mapping[str, Path]] = dict
    """The files of the cache that all tasks need, by their names below its folder."""
    cpus: int = 1
    gpus: float = 0.0
    _kept: dict[str, Any] = field(default_factory=dict)
    """References to the contents of files, by name."""
    _opened: bool = False

    def start(self) -> NodeWorker:
        """Start an actor where the cluster has room for one; it starts its worker."""
        self.open()
        ray = self.runtime.connected()
        for name, file in self.files().items():
            if name not in self._kept:
                self._kept[name] = ray.put(file.read_bytes())
        options = {"num_cpus": self.cpus, "num_gpus": self.gpus, "max_restarts": 0, "max_task_retries": 0}
        actor = ray.remote(Holder).options(**options).remote()
        return NodeWorker(actor, actor.start.remote(self._plan(), self._kept))

    def _plan(self) -> str:
        """Return as JSON what a worker builds, and where it finds code and relative paths, if they are there too."""
        own = {"make": name_of(self.make), "shared": self.shared}
        return json.dumps({**own, "working": os.getcwd(), "path": [os.path.abspath(entry) for entry in sys.path]})

    def open(self) -> None:
        """Connect to the cluster. Raises ConfigError if there is none, or if none of its nodes can hold a worker."""
        if self._opened:
            return
        nodes = self.runtime.nodes()
        if not any(n.get("CPU", 0.0) >= self.cpus and n.get("GPU", 0.0) >= self.gpus for n in nodes):
            most = [f"{max((n.get(what, 0.0) for n in nodes), default=0.0):g} {what}s" for what in ("CPU", "GPU")]
            raise ConfigError(
                f"A node of the Ray cluster has {self.cpus} CPUs (executor.threads) and {self.gpus:g} GPUs "
                f"(executor.gpus) for a worker, but got at most {' and '.join(most)} a node. Ask for less."
            )
        self._opened = True

    def heard(self, workers: Sequence[NodeWorker], seconds: float) -> Collection[NodeWorker]:
        """Return the workers that have said something or have died."""
        import ray

        waited = {w.said: w for w in workers if w.said is not None}
        found, _ = ray.wait(list(waited), num_returns=1, timeout=seconds) if waited else ([], [])
        return [waited[reference] for reference in found]

    def close(self) -> None:
        """Leave the cluster, or end it if it was started for this study."""
        self._kept.clear()
        self._opened = False
        self.runtime.close()


def _reason(error: Exception) -> str:
    cause = getattr(error, "cause", None) or error
    text = " ".join(str(cause).split())[:LONGEST]
    return f"{type(cause).__name__}: {text}"
