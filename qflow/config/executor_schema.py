"""What the group `executor` of a configuration may hold."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(kw_only=True)
class ExecutorSchema:
    """Where trials run."""

    kind: str = "serial"
    """Where trials run: serial is one after the other in this process, process is in worker processes (tune)."""
    device: str = "cpu"
    """Device of torch: cpu, cuda or cuda:<n>."""
    threads: int = 0
    """Threads of torch, in each process; 0 leaves torch's own choice."""
    workers: int = 1
    """Trials at once; more than one with executor=process."""
    max_retries: int = 1
    """How often a trial is tried again whose worker has died."""
    trial_timeout: float | None = None
    """Seconds after which the worker of a trial is ended; null sets no limit."""
