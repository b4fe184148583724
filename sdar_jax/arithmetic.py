"""Integer arithmetic that every room needs."""

from jaxtyping import Array


def ceil_div[Number: (int, Array)](number: Number, divisor: int) -> Number:
    """Divides and rounds up."""
    return -(-number // divisor)


def round_up(number: int, unit: int) -> int:
    """Rounds up to a multiple of `unit`."""
    return ceil_div(number, unit) * unit
