"""What the group `executor` of a configuration may hold."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from omegaconf import DictConfig

from qflow.core.errors import ConfigError
from qflow.core.limits import Above, Between, OneOf
from qflow.executor.ray_runtime import check_address, check_installed

KINDS = ("serial", "process", "ray", "ray_cluster")
MOST_THREADS = 1024
"""torch crashes the process where the system cannot start the threads that it is told to use."""
MOST_WORKERS, MOST_RETRIES, MOST_GPUS = 256, 10, 64


@dataclass(kw_only=True)
class ExecutorSchema:
    """Where trials run."""

    kind: Annotated[str, OneOf(KINDS)] = "serial"
    """Where trials run: serial is in this process, process in workers (tune), ray and ray_cluster in workers of Ray.
    They are on this machine, or with ray_cluster on the nodes of a cluster."""
    device: str = "cpu"
    """Device of torch: cpu, cuda or cuda:<n>."""
    threads: Annotated[int, Between(0, MOST_THREADS)] = 0
    """Threads of torch, in each process; 0 leaves torch's own choice."""
    workers: Annotated[int, Between(1, MOST_WORKERS)] = 1
    """Trials at once; more than one needs workers (executor=process, ray, ray_cluster)."""
    max_retries: Annotated[int, Between(0, MOST_RETRIES)] = 1
    """How often a trial is tried again whose worker has died."""
    trial_timeout: Annotated[float, Above(0.0)] | None = None
    """Seconds after which the worker of a trial is ended; null sets no limit."""
    gpus: Annotated[float, Between(0.0, MOST_GPUS)] = 0.0
    """GPUs that Ray reserves for a trial, such as 0.5."""
    address: str = "auto"
    """Of the Ray cluster, <host>:<port>; auto is that of this machine. With executor=ray_cluster."""


def check_executor(config: DictConfig) -> None:
    """Raise ConfigError for keys that do not go together; each has kept to the limits of its type."""
    executor = config.executor
    if executor.kind == "serial" and executor.workers > 1:
        raise ConfigError(
            f"executor.workers is 1 with executor.kind=serial, but got {executor.workers}. Use executor=process."
        )
    if executor.trial_timeout is not None and executor.kind == "serial":
        raise ConfigError(
            f"A trial is ended with its worker process, but got executor.trial_timeout={executor.trial_timeout:g} with "
            "executor.kind=serial. Use executor=process."
        )
    if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", executor.device):
        raise ConfigError(
            f"executor.device is cpu, cuda or cuda:<n>, but got {executor.device!r}. Use executor.device=cpu."
        )
    _check_ray(executor)


def _check_ray(executor: DictConfig) -> None:
    """Raise ConfigError for what Ray cannot give, and for its keys with an executor that does not use Ray."""
    kind, gpus, device = executor.kind, executor.gpus, executor.device
    if executor.address != "auto" and kind != "ray_cluster":
        raise ConfigError(
            f"executor.address is that of a Ray cluster, but got it with executor.kind={kind}. Use "
            "executor=ray_cluster."
        )
    if not kind.startswith("ray"):
        if gpus:
            raise ConfigError(
                f"executor.gpus is what Ray reserves for a trial, but got {gpus:g} with executor.kind={kind}, whose "
                "workers share the GPU of executor.device. Use executor=ray."
            )
        return
    check_address(executor.address)
    if not 0 <= gpus <= MOST_GPUS or (gpus > 1 and gpus != int(gpus)):
        raise ConfigError(
            f"executor.gpus is a share of at most 1, or a number of GPUs up to {MOST_GPUS}, but got {gpus:g}. Use "
            "executor.gpus=0.5."
        )
    if (device == "cpu") != (gpus == 0):
        raise ConfigError(
            f"Ray shows a worker the GPUs that are reserved for it, but got executor.gpus={gpus:g} with "
            f"executor.device={device}. Use {'executor.device=cuda' if gpus else 'executor.gpus=0.5'}."
        )
    if device not in ("cpu", "cuda"):
        raise ConfigError(
            f"executor.device is cpu or cuda with executor.kind={kind}, because Ray chooses the GPU, but got {device}. "
            "Use executor.device=cuda."
        )
    check_installed(kind)
