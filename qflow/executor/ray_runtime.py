"""The connection to Ray: a cluster that exists, or one on this machine for the time of a study."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qflow.core.errors import ConfigError
from qflow.executor.own_folder import own_folder
from qflow.process.interrupts import Terminated

ADDRESS = re.compile(r"auto|[A-Za-z0-9._-]{1,253}:\d{1,5}|\[[0-9a-fA-F:]{2,45}\]:\d{1,5}")
REACHED = 5.0  # seconds in which the head of a cluster must answer; Ray itself would try for a minute and a half


def check_installed(kind: str) -> None:
    """Raise ConfigError if Ray is not installed."""
    if find_spec("ray") is None:
        raise ConfigError(
            f"executor={kind} needs the package ray, but got none here. Install it: pip install 'qflow[ray]'."
        )


def check_address(address: str) -> None:
    """Raise ConfigError for what cannot be the address of a cluster."""
    if not ADDRESS.fullmatch(address):
        raise ConfigError(
            f"executor.address is auto or <host>:<port> of a Ray cluster, but got {address!r}. Use "
            "executor.address=auto on a node of it."
        )


@dataclass
class Runtime:
    """Ray as this process sees it; nothing is started before `connected`."""

    address: str | None = None
    """Of a cluster, or auto for that of this machine; None starts one on this machine."""
    cpus: int = 1
    """How many CPUs a cluster that is started here offers."""
    _folder: Path | None = field(default=None, init=False)
    _opened: bool = field(default=False, init=False)

    def connected(self) -> Any:
        """Return the module ray, connected. Raises ConfigError."""
        import ray

        if not ray.is_initialized():
            with _handlers_kept():
                self._join(ray) if self.address else self._begin(ray)
            self._opened = True
        return ray

    def nodes(self) -> list[dict[str, float]]:
        """Return the resources of each node that is alive."""
        return [node["Resources"] for node in self.connected().nodes() if node["Alive"]]

    def close(self) -> None:
        """Leave the cluster, or end the one that `connected` has started."""
        if self._opened:
            import ray

            self._opened = False
            with _handlers_kept():
                ray.shutdown()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _begin(self, ray: Any) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent to the makers of Ray
        self._folder = own_folder()  # a short path: Ray's sockets lie in it
        try:
            ray.init(
                address="local", num_cpus=self.cpus, include_dashboard=False, _temp_dir=str(self._folder), **_QUIET
            )
        except Exception as error:  # Ray raises many kinds
            raise ConfigError(
                f"Ray starts on this machine, but got {_line(error)}. Use executor=process, which needs no Ray."
            ) from None

    def _join(self, ray: Any) -> None:
        assert self.address is not None
        if self.address != "auto":
            _reach(self.address)
        try:
            ray.init(address=self.address, **_QUIET)
        except Exception as error:
            raise ConfigError(
                f"executor.address names a Ray cluster, but got {self.address}: {_line(error)}. Start one (ray start "
                "--head), or use executor=ray."
            ) from None


_QUIET: dict[str, Any] = {"log_to_driver": False, "logging_level": "CRITICAL"}


def _reach(address: str) -> None:
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host.strip("[]"), int(port)), REACHED).close()
    except (OSError, OverflowError, UnicodeError) as error:
        raise ConfigError(
            f"executor.address names a Ray cluster that answers, but got {address}: {_line(error)}. Start one (ray "
            "start --head), or use executor=ray."
        ) from None


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200].rstrip(".") or type(error).__name__


@contextmanager
def _handlers_kept() -> Iterator[None]:
    """Restore the handlers of Ctrl-C and SIGTERM, which Ray replaces by its own: at SIGTERM it exits with code 15."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except SystemExit as error:
        raise Terminated("SIGTERM") from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
