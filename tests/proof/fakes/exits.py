"""Takes its process along, without a word."""

import os

from tests.proof.fakes.right import backward, unsupported

__all__ = ["backward", "forward", "unsupported"]


def forward(q, k, v, ranges, *, scale):
    os._exit(3)
