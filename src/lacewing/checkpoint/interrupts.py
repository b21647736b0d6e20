"""Ctrl-C while work is handed to threads."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["uninterrupted"]


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ctrl-C waits until the end. `ThreadPoolExecutor.submit` holds locks that its workers want:
    interrupted inside, it may leave them locked, and nobody could ever join the workers."""
    old = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or old is None:
        yield  # handlers of Python run in the main thread only
        return
    seen: list[int] = []
    signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, old)
        if seen:
            signal.raise_signal(signal.SIGINT)
