"""What belongs together is changed whole, or built anew."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Recovery:
    """Whether the state of host and device is whole, and how it becomes so again.

    An interruption may come anywhere: state that was donated to a call is then gone, and what the host knows may be
    half changed. What runs in `changing` is done whole, or the next `recover` builds the state anew.

    Args:
        reset: builds the state anew from what no change touches. It may be interrupted, and is then called again.
    """

    def __init__(self, reset: Callable[[], None]):
        self._reset = reset
        self._whole = False

    @contextmanager
    def changing(self) -> Iterator[None]:
        """What runs in here changes host and device together; if it does not end, the state is not whole."""
        self._whole = False
        yield
        self._whole = True

    def lost(self) -> None:
        """Says that the state is gone: the device failed."""
        self._whole = False

    def recover(self) -> bool:
        """Resets the state if it is not whole; whether it was not."""
        if self._whole:
            return False
        with self.changing():
            self._reset()
        return True
