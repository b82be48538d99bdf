"""Ctrl-C and SIGTERM while a study is driven."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(KeyboardInterrupt):
    """The process was asked to end (SIGTERM)."""


@contextmanager
def interrupts() -> Iterator[threading.Event]:
    """Raise Terminated on SIGTERM while inside, as Ctrl-C raises KeyboardInterrupt; main thread only.

    The event is set on both: Python drops an exception that is raised within a finalizer or a callback from C.
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
