"""What is interrupted is built anew, once."""

import pytest

from sdar_jax.decoding.engine.recovery import Recovery


def test_what_is_interrupted_is_reset_once():
    resets = []
    recovery = Recovery(lambda: resets.append(None))
    assert recovery.recover() and len(resets) == 1
    with recovery.changing():
        pass
    assert not recovery.recover() and len(resets) == 1
    with pytest.raises(KeyboardInterrupt), recovery.changing():
        raise KeyboardInterrupt
    assert recovery.recover() and not recovery.recover() and len(resets) == 2
    recovery.lost()
    assert recovery.recover() and len(resets) == 3


def test_an_interrupted_reset_is_done_again():
    attempts = []

    def reset():
        attempts.append(None)
        if len(attempts) == 1:
            raise KeyboardInterrupt

    recovery = Recovery(reset)
    with pytest.raises(KeyboardInterrupt):
        recovery.recover()
    assert recovery.recover() and len(attempts) == 2
