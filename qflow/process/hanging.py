"""Calls to something outside that may hang: it takes the call and never answers, so that nothing ends by itself."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

T = TypeVar("T")
TICK = 0.25  # seconds between two looks at a call


def answered(function: Callable[[], T], seconds: float) -> T:
    """Return `function()`, which runs in a thread. Raises TimeoutError if it takes longer, and leaves it behind then.

    For a first call to a server: name resolution and most drivers of databases cannot be interrupted otherwise.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:  # raised again below, in the thread of the caller
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return results[0]


@contextmanager
def watched(look: Callable[[FrameType | None], None]) -> Iterator[None]:
    """Call `look` every `TICK` seconds while the block runs, in the main thread, where it may raise to end the block.

    It gets the frame that runs or waits. The signal of a timer does this, as nothing else reaches a thread that waits
    in a system call.
    """

    def tick(_signum: int, frame: FrameType | None) -> None:
        look(frame)

    before = signal.signal(signal.SIGALRM, tick)
    timer = signal.setitimer(signal.ITIMER_REAL, TICK, TICK)
    try:
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
    finally:  # also of a tick in the lines above
        signal.setitimer(signal.ITIMER_REAL, *timer)
        signal.signal(signal.SIGALRM, before)
