"""A lock that no thread keeps from the others."""

import threading
from contextlib import suppress


class FairLock:
    """Whoever releases it does not get it again before a thread that waits for it. It is not to be taken twice.

    With an ordinary lock, a thread that runs an engine step by step would keep the others from ever adding a request.
    """

    def __init__(self):
        self._next = threading.Lock()
        self._held = threading.RLock()

    def __enter__(self) -> None:
        # Who waits for the lock holds `_next`, so that whoever has just released the lock queues up behind it.
        with self._next:
            self._held.acquire()

    def __exit__(self, *_) -> None:
        # More than once where an interruption came between taking the lock and what it was taken for.
        with suppress(RuntimeError):
            while True:
                self._held.release()
