"""Worker processes on this machine.

A worker is a new interpreter (spawned, because torch must not be forked). It is the leader of a process group of its
own, so that Ctrl-C at a terminal reaches the driver alone, and so that a worker is ended together with the processes
that it has started, such as those of a data loader. A worker ends itself when its driver ends, however that happens.
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import threading
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from pathlib import Path
from typing import Any

from qflow.executor.pool import GLANCE, Died, Make
from qflow.process.allocator import keep_freed_memory


@dataclass(frozen=True, eq=False)
class ProcessWorker:
    """A worker in a process of its own, at the other end of a pipe."""

    process: SpawnProcess
    connection: Connection

    def send(self, task: bytes, folder: Path | None = None) -> None:
        """Hand it a task, whose folder it shares."""
        with suppress(OSError):  # it has died meanwhile: `receive` says so
            self.connection.send_bytes(task)

    def receive(self) -> bytes:
        """Return what it has said. Raises Died."""
        try:
            while not self.connection.poll(GLANCE):
                if self.process.exitcode is not None:  # another process may keep its pipe open
                    raise EOFError
            return self.connection.recv_bytes()
        except (EOFError, OSError):
            self.process.join(GLANCE)  # its pipe closes before its exit code is known
            raise Died(_death(self.process.exitcode)) from None

    def end(self) -> None:
        """End the process and all that it has started."""
        assert self.process.pid is not None
        with suppress(ProcessLookupError, PermissionError):  # it has ended, or did not get to its own group
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.connection.close()


@dataclass(frozen=True)
class Processes:
    """The backend of processes on this machine (executor=process)."""

    make: Make
    shared: Mapping[str, Any]

    def start(self) -> ProcessWorker:
        """Start a process."""
        return started(name_of(self.make), self.shared)

    def heard(self, workers: Sequence[ProcessWorker], seconds: float) -> Collection[ProcessWorker]:
        """Return the workers that have said something or have died."""
        said = wait([w.connection for w in workers], seconds)
        return [w for w in workers if w.connection in said or w.process.exitcode is not None]

    def close(self) -> None:
        """Nothing is left when the processes have ended."""


def _death(code: int | None) -> str:
    """Return in words how a process has ended."""
    if code is None or code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"{name} (the system sends it when memory is short)" if -code == signal.SIGKILL else name


def name_of(make: Make) -> str:
    """Return a function of a module as text, `module:function`: workers import it."""
    return f"{make.__module__}:{make.__qualname__}"


def started(make: str, shared: Mapping[str, Any]) -> ProcessWorker:
    """Start a worker with a function by its name (`name_of`)."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=serve, args=(there, make, json.dumps(shared)))  # not daemonic: it may have loaders
    process.start()
    there.close()  # else the end of the worker would not close the pipe
    return ProcessWorker(process, here)


def serve(connection: Connection, make: str, shared: str) -> None:
    """Be a worker: build what all tasks need, then answer tasks until the driver closes the pipe."""
    os.setpgid(0, 0)
    driver = multiprocessing.parent_process()
    assert driver is not None
    threading.Thread(target=_end_with, args=(driver.sentinel,), daemon=True).start()
    os.dup2(2, 1)  # what the user's code prints must not mix with the driver's lines
    keep_freed_memory()
    module, _, function = make.partition(":")
    handle = getattr(importlib.import_module(module), function)(json.loads(shared))
    with suppress(EOFError, OSError):  # the driver has ended
        connection.send_bytes(b"ready")
        while True:
            task = json.loads(connection.recv_bytes())
            connection.send_bytes(json.dumps(handle(task)).encode())


def _end_with(driver: int) -> None:
    wait([driver])
    os.killpg(0, signal.SIGKILL)
