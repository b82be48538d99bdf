"""Whether a process that another one has noted still runs, as far as this host can know it."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Process:
    """A process, and the host that its number belongs to."""

    host: str
    machine: str
    """Boot of the kernel and name space of process ids; empty if the system does not tell."""
    pid: int
    started: str
    """Start in clock ticks after the boot, which tells it from a later process of the same number."""


def this_process() -> Process:
    """Return the process that calls."""
    return Process(socket.gethostname(), _machine(), os.getpid(), _started(os.getpid()))


def is_running(process: Process) -> bool | None:
    """Return whether `process` runs; None for one of another host or of an earlier boot, or if /proc is missing."""
    here = (socket.gethostname(), _machine())
    if not here[1] or here != (process.host, process.machine):
        return None
    return bool(process.started) and _started(process.pid) == process.started


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _started(pid: int) -> str:
    """Return when a process was started (field 22 of proc(5) stat); empty if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if fields[0] in "ZX" else fields[19]
