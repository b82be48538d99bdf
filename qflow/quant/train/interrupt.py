"""Interrupts wait for the end of a training step, because a training can only be resumed between two steps."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def interrupts_held() -> Iterator[threading.Event]:
    """On SIGINT or SIGTERM set the event instead of interrupting; on leaving, raise the signal for its own handler.

    A second signal is raised at once, in case a step does not end. Python delivers signals to the main thread only; in
    any other thread the event is never set.
    """
    held = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield held
        return
    received: list[int] = []

    def hold(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        held.set()
        if len(received) > 1:
            restore()
            signal.raise_signal(number)

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)

    before = {number: signal.signal(number, hold) for number in SIGNALS}
    try:
        yield held
    finally:
        restore()
        if len(received) == 1:
            signal.raise_signal(received[0])
