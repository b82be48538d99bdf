"""Ctrl-C and SIGTERM as exceptions."""

from __future__ import annotations

import atexit
import gc
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(KeyboardInterrupt):
    """The process received SIGTERM."""


INTERRUPTED = 130  # exit code, as a shell gives it to what Ctrl-C has ended


def end_at_once() -> None:
    """Let Ctrl-C and SIGTERM end this process with one line, while it imports and after its command has ended.

    For the entry point of a process, which has nothing open at these times; `interrupts` replaces it in between.
    The interpreter then leaves out its last collection of garbage, which takes seconds after torch and MLflow.
    """
    atexit.register(gc.freeze)

    def end(_signum: int, _frame: FrameType | None) -> None:
        os.write(2, b"qflow: Interrupted.\n")
        os._exit(INTERRUPTED)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)


@contextmanager
def interrupts() -> Iterator[threading.Event]:
    """Raise Terminated on SIGTERM inside the block, as Ctrl-C raises KeyboardInterrupt; in the main thread only.

    Both signals also set the event, because Python drops an exception that is raised in a finalizer or a C callback.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def stop(signum: int, _frame: FrameType | None) -> None:
        asked.set()
        raise Terminated("SIGTERM") if signum == signal.SIGTERM else KeyboardInterrupt

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
