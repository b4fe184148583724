"""Answers that know when each of their tokens was committed: a model's own unmasking order, to be learned.

d3LLM (arXiv 2601.07568) calls them pseudo-trajectories. A record is a line of what `sample.py --input --output` writes:

    {"prompt_ids": [5, 9], "tokens": [7, 3, 8], "steps": [1, 0, 2], "finish_reason": "stop", "stop_reason": 2,
     "stop_step": 3}

The last three may be missing; all else in it is not read.
"""

from typing import Any, NamedTuple

from sdar_jax.errors import DataError, is_int

# Two more fit in int32: what stands behind an answer comes after its last.
_LARGEST_STEP = 2**31 - 3


class Trajectory(NamedTuple):
    """A prompt and its answer.

    Attributes:
        tokens: of both, with the stop token that ended the answer.
        order: the denoising step that committed each token; -1 for the prompt.
        ended: whether the answer came to its end, and was not cut off.
    """

    tokens: list[int]
    order: list[int]
    ended: bool


def read_trajectory(record: dict[str, Any], largest_id: int) -> Trajectory:
    """Reads a record.

    Args:
        largest_id: of the tokenizer.

    Raises:
        DataError: without saying where, what is missing or does not fit together.
    """
    prompt = _integers(record, "prompt_ids", largest_id)
    tokens = _integers(record, "tokens", largest_id)
    steps = _integers(record, "steps", _LARGEST_STEP)
    if len(steps) != len(tokens):
        raise DataError(
            f'"steps" has {len(steps)} entries and "tokens" {len(tokens)}; give the step of each token'
        )
    stop = record.get("stop_reason")
    if is_int(stop):
        tokens = [*tokens, _integer(stop, "stop_reason", largest_id)]
        # A stop token of unknown step was committed after all else.
        step = record.get("stop_step")
        last = max(steps, default=-1) + 1
        steps = [*steps, last if step is None else _integer(step, "stop_step", _LARGEST_STEP)]
    if not tokens:
        raise DataError('"tokens" is empty; leave the record out')
    ended = record.get("finish_reason", "stop") == "stop"
    return Trajectory(prompt + tokens, [-1] * len(prompt) + steps, ended)


def _integers(record: dict[str, Any], name: str, largest: int) -> list[int]:
    values = record.get(name)
    if not isinstance(values, list):
        raise DataError(
            f'"{name}" is no list of numbers; give what `sample.py --input --output` writes'
        )
    return [_integer(value, name, largest) for value in values]


def _integer(value: Any, name: str, largest: int) -> int:
    if not is_int(value) or not 0 <= value <= largest:
        raise DataError(f'"{name}" has {value!r}; give whole numbers from 0 to {largest}')
    return value
