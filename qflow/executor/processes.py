"""Worker processes on this machine, each of which handles one task at a time.

A worker is a new interpreter (spawned, because torch must not be forked). It gets what all tasks share once, and then
tasks and answers as JSON: nothing but plain data passes in either direction. It is the leader of a process group of its
own, so that Ctrl-C at a terminal reaches the driver alone, and so that a worker is ended together with the processes
that it has started, such as those of a data loader. A worker ends itself when its driver ends, however that happens.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, TypeAlias

from qflow.core.errors import TrialError
from qflow.process.allocator import keep_freed_memory

Answer: TypeAlias = dict[str, Any]
Handle: TypeAlias = Callable[[Mapping[str, Any]], Answer]
Make: TypeAlias = Callable[[Mapping[str, Any]], Handle]
"""A function of a module, which every worker calls once with what all tasks share; it returns what handles a task."""
GLANCE = 1.0  # seconds after which a wait looks whether a worker is alive whose pipe another process keeps open


@dataclass
class Job:
    """A task that was submitted."""

    processes: Processes
    task: bytes
    deaths: int = 0
    """How many workers have died over it."""
    answer: Answer | None = None
    refusal: str = ""
    """Why there is no answer."""

    def result(self) -> Answer:
        """Wait for the answer. Raises TrialError if the workers die over the task, or it takes too long."""
        while self.answer is None and not self.refusal:
            self.processes.step()
        if self.answer is None:
            raise TrialError(self.refusal)
        return self.answer


@dataclass(eq=False)
class _Worker:
    process: SpawnProcess
    connection: Connection
    job: Job | None = None
    ready: bool = False
    """Whether it has built what all tasks need; it takes a task only then."""
    since: float = 0.0
    """When it got its task."""

    def end(self) -> None:
        """End the process and all that it has started."""
        assert self.process.pid is not None
        with suppress(ProcessLookupError, PermissionError):  # it has ended, or did not get to its own group
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.join()
        self.connection.close()


@dataclass
class Processes:
    """At most `workers` processes; they start with the first task, and a dead one is replaced when a task needs it."""

    make: Make
    shared: Mapping[str, Any]
    workers: int
    timeout: float | None = None
    """Seconds that a task may take, without the start of its worker."""
    max_retries: int = 1
    """How often a task is tried again whose worker has died."""
    _alive: list[_Worker] = field(default_factory=list)
    _queue: deque[Job] = field(default_factory=deque)

    def submit(self, task: Mapping[str, Any]) -> Job:
        """Hand a task to the first worker that is free. Its answer is waited for with `Job.result`."""
        job = Job(self, json.dumps(task).encode())
        self._queue.append(job)
        self._assign()
        return job

    def close(self) -> None:
        """End all workers, whatever they do."""
        self._queue.clear()
        while self._alive:
            self._alive.pop().end()

    def step(self) -> None:
        """Wait until a worker has something to say, has died, or has taken too long; at most `GLANCE` seconds."""
        self._assign()
        now = time.monotonic()
        left = [w.since + self.timeout - now for w in self._alive if self.timeout is not None and w.job]
        heard = wait([w.connection for w in self._alive], max(min([GLANCE, *left]), 0.0))
        for worker in list(self._alive):
            if worker.connection in heard:
                self._hear(worker)
            elif worker.process.exitcode is not None:
                self._buried(worker)
            elif self._late(worker):
                self._stop(worker)

    def _assign(self) -> None:
        """Start missing workers as long as there are tasks, and hand tasks to free ones."""
        while self._queue and len(self._alive) < self.workers:
            self._alive.append(_started(self.make, self.shared))
        for worker in self._alive:
            if not self._queue:
                break
            if worker.job is None and worker.ready:
                worker.job, worker.since = self._queue.popleft(), time.monotonic()
                with suppress(OSError):  # it has died meanwhile: the next step sees that
                    worker.connection.send_bytes(worker.job.task)

    def _hear(self, worker: _Worker) -> None:
        try:
            said = worker.connection.recv_bytes()
        except (EOFError, OSError):
            self._buried(worker)
            return
        if not worker.ready:
            worker.ready = True
        elif worker.job is not None:
            worker.job.answer, worker.job = json.loads(said), None
        self._assign()

    def _late(self, worker: _Worker) -> bool:
        running = self.timeout is not None and worker.job is not None
        return running and time.monotonic() - worker.since >= (self.timeout or 0.0)

    def _stop(self, worker: _Worker) -> None:
        job = worker.job
        self._alive.remove(worker)
        worker.end()
        assert job is not None
        job.refusal = (
            f"A trial ends within executor.trial_timeout={self.timeout:g} s, but got one that was still running, so "
            "its worker was ended. Allow more time, or find what hangs."
        )

    def _buried(self, worker: _Worker) -> None:
        """Remove a worker that has died; the task that it had, or was to get, is tried again or refused."""
        self._alive.remove(worker)
        worker.process.join(GLANCE)  # its pipe closes before its exit code is known
        worker.end()
        job = worker.job or (self._queue.popleft() if self._queue and not worker.ready else None)
        if job is None:
            return
        job.deaths += 1
        if job.deaths <= self.max_retries:
            self._queue.appendleft(job)
            return
        job.refusal = (
            f"A worker lives until its trial is evaluated, but got {_death(worker.process.exitcode)}, {job.deaths} "
            f"times with the retries of executor.max_retries={self.max_retries}."
        )


def _death(code: int | None) -> str:
    """Return in words how a process has ended."""
    if code is None or code >= 0:
        return f"exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"{name} (the system sends it when memory is short)" if -code == signal.SIGKILL else name


def _started(make: Make, shared: Mapping[str, Any]) -> _Worker:
    context = multiprocessing.get_context("spawn")
    own, other = context.Pipe()
    process = context.Process(target=serve, args=(other, make, json.dumps(shared)))  # not daemonic: it may have loaders
    process.start()
    other.close()  # else the end of the worker would not close the pipe
    return _Worker(process, own)


def serve(connection: Connection, make: Make, shared: str) -> None:
    """Be a worker: build what all tasks need, then answer tasks until the driver closes the pipe."""
    os.setpgid(0, 0)
    driver = multiprocessing.parent_process()
    assert driver is not None
    threading.Thread(target=_end_with, args=(driver.sentinel,), daemon=True).start()
    os.dup2(2, 1)  # what the user's code prints must not mix with the driver's lines
    keep_freed_memory()
    handle = make(json.loads(shared))
    with suppress(EOFError, OSError):  # the driver has ended
        connection.send_bytes(b"ready")
        while True:
            task = json.loads(connection.recv_bytes())
            connection.send_bytes(json.dumps(handle(task)).encode())


def _end_with(driver: int) -> None:
    wait([driver])
    os.killpg(0, signal.SIGKILL)
