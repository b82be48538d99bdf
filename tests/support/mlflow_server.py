"""A real MLflow server that can be away for its clients: a gate before it is shut, and its connections drop."""

from __future__ import annotations

import socket
import threading
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from qflow.tracking.connect import open_store


class Gate:
    """A relay on a port of its own; while it is shut, its port refuses connections."""

    def __init__(self, behind: int) -> None:
        self.behind = behind
        self._open: list[socket.socket] = []
        with closing(socket.create_server(("127.0.0.1", 0))) as found:
            self.port = found.getsockname()[1]
        self.open()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def open(self) -> None:
        self._server = socket.create_server(("127.0.0.1", self.port))
        threading.Thread(target=self._accept, args=[self._server], daemon=True).start()

    def shut(self) -> None:
        for end in [self._server, *self._open]:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._open.clear()

    def _accept(self, server: socket.socket) -> None:
        with suppress(OSError):
            while True:
                ends = server.accept()[0], socket.create_connection(("127.0.0.1", self.behind))
                self._open += ends
                for one, other in (ends, ends[::-1]):
                    threading.Thread(target=_pass_on, args=[one, other], daemon=True).start()


def _pass_on(one: socket.socket, other: socket.socket) -> None:
    with suppress(OSError):
        while data := one.recv(65536):
            other.sendall(data)
    for end in (one, other):
        with suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)


@contextmanager
def gated_server(store: Path):
    """Start an MLflow server on a new store in a folder and yield the gate before it; the server is killed at last."""
    with pytest.MonkeyPatch.context() as patched:
        patched.syspath_prepend(str(Path(__file__).parents[2]))
        from benchmarks.servers import MlflowServer

    open_store(None, store)  # a database that tests share is quicker than the server's migrations
    with MlflowServer(store, f"sqlite:///{store}/mlflow.db") as server:
        yield Gate(server.port)
