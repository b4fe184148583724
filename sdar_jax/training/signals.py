"""Notes SIGTERM and SIGINT, so that the loop can read them between two steps."""

import signal
import threading


class Interrupts:
    """Inside this `with`, the first SIGTERM or SIGINT (Ctrl-C) is noted in `received`; a second one acts as usual.

    Outside the main thread, where Python allows no handlers, nothing is noted.
    """

    def __init__(self):
        self.received: int | None = None
        self._before = {}

    def __enter__(self) -> "Interrupts":
        if threading.current_thread() is threading.main_thread():
            self._before = {
                number: signal.signal(number, self._note)
                for number in (signal.SIGTERM, signal.SIGINT)
            }
        return self

    def __exit__(self, *_) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, _) -> None:
        self.received = number
        self.__exit__()
