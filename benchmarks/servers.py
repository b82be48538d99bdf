"""A PostgreSQL server and an MLflow server of one's own, which can be killed and started again."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

BIN = next(
    (p for p in (*Path("/usr/lib/postgresql").glob("*/bin"), Path("/usr/local/bin")) if (p / "initdb").exists()), None
)
MISSING = "" if BIN and find_spec("psycopg") else "PostgreSQL (initdb) or its driver psycopg is not installed"
"""Why there is no PostgreSQL server here; empty if there is."""


def free_port(host: str = "127.0.0.1") -> int:
    """Return a port that nothing listens on."""
    with closing(socket.create_server((host, 0))) as found:
        return int(found.getsockname()[1])


class Postgresql:
    """A PostgreSQL server with the databases `mlflow` and `search`; use it in a `with` block."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="qflow-pg-")
        self.place, self.host, self.port = Path(self._folder.name), host, free_port(host)
        user = ["runuser", "-u", "nobody", "--"] if os.geteuid() == 0 else []  # PostgreSQL refuses to run as root
        self._as_user = user
        if user:
            shutil.chown(self.place, "nobody")

    def __enter__(self) -> Postgresql:
        self._run("initdb", "-D", f"{self.place}/data", "-A", "trust", "-U", "q", "--no-sync")
        with open(self.place / "data" / "pg_hba.conf", "a", encoding="ascii") as file:
            file.write("host all all 10.0.0.0/8 trust\n")
        self.start()
        for name in ("mlflow", "search"):
            self._run("createdb", "-h", self.host, "-p", str(self.port), "-U", "q", name)
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(subprocess.CalledProcessError):  # it may be down
            self._control("-m", "immediate", "stop")
        self._folder.cleanup()

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        options = f"-h {self.host} -p {self.port} -k {self.place} -c fsync=off"
        self._control("-l", f"{self.place}/log", "-o", options, "start")

    def kill(self) -> None:
        """End all processes of the server at once; what was committed is recovered at the next start."""
        self._control("-m", "immediate", "stop")

    @contextmanager
    def hanging(self) -> Iterator[None]:
        """Let the server take connections and statements inside, and answer none."""
        first = int((self.place / "data" / "postmaster.pid").read_text(encoding="ascii").split()[0])
        children = Path(f"/proc/{first}/task/{first}/children").read_text(encoding="ascii")
        processes = [first, *map(int, children.split())]
        for process in processes:
            os.kill(process, signal.SIGSTOP)
        try:
            yield
        finally:
            for process in processes:
                os.kill(process, signal.SIGCONT)

    def url(self, name: str) -> str:
        """Return the address of a database."""
        return f"postgresql+psycopg://q@{self.host}:{self.port}/{name}"

    def _control(self, *arguments: str) -> None:
        self._run("pg_ctl", "-D", f"{self.place}/data", "-w", *arguments)

    def _run(self, program: str, *arguments: str) -> None:
        assert BIN is not None
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": self.place}
        subprocess.run([*self._as_user, str(BIN / program), *arguments], check=True, timeout=120, **quiet)


class MlflowServer:
    """An MLflow server on a database, with the files below `place`; use it in a `with` block."""

    def __init__(self, place: Path, database: str) -> None:
        self.place, self.database, self.port = place, database, free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> MlflowServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start the server, and wait until it answers."""
        command = [sys.executable, "-m", "mlflow", "server", "--backend-store-uri", self.database, "--workers", "1"]
        command += ["--artifacts-destination", str(self.place / "files"), "--port", str(self.port)]
        quiet: dict[str, Any] = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        plain = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}  # its workers would outlive a kill
        self._process = subprocess.Popen(command, start_new_session=True, env=plain, **quiet)
        end = time.monotonic() + 180
        while time.monotonic() < end and self._process.poll() is None:
            with suppress(OSError):
                urllib.request.urlopen(f"{self.uri}/health", timeout=1).close()
                return
            time.sleep(0.3)
        self.kill()
        raise SystemExit("the MLflow server must answer within 180 s, but did not.")

    def kill(self) -> None:
        """End the server with SIGKILL."""
        if self._process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
