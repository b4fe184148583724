"""Is refused by its compiler."""

from tests.proof.fakes.right import backward, unsupported

__all__ = ["backward", "forward", "unsupported"]


def forward(q, k, v, ranges, *, scale):
    raise NotImplementedError("no layout for\n this")
