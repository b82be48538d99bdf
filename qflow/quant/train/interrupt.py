"""Interrupts wait for the end of a step: only between two steps is there a state to go on from."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def interrupts_held() -> Iterator[threading.Event]:
    """Set the event instead of interrupting; on leaving the interrupt is given to whoever handled it before.

    A second one is given at once, for a step that does not end. Signals arrive in the main thread only; elsewhere the
    event is never set.
    """
    held = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield held
        return
    came: list[int] = []

    def hold(number: int, _frame: FrameType | None) -> None:
        came.append(number)
        held.set()
        if len(came) > 1:
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
        if len(came) == 1:
            signal.raise_signal(came[0])
