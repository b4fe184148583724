"""Never ends: a barrier that nobody arrives at."""

import time

from tests.proof.fakes.right import backward, unsupported

__all__ = ["backward", "forward", "unsupported"]


def forward(q, k, v, ranges, *, scale):
    time.sleep(10_000)
