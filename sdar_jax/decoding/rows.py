"""What a batch of requests is while it decodes: arrays with one entry a row, which the host fills and reads."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from sdar_jax.decoding.commit_rules import CommitRule
from sdar_jax.decoding.config import DecodingConfig, sampling_params
from sdar_jax.decoding.sampling_params import SamplingParams

_Number = Int[Array, "*B"]
_Flag = Bool[Array, "*B"]


class Rows(NamedTuple):
    """The state of B rows; int32 or bool. One row, without the leading axis, is what `make_row` makes.

    The window of a row is K slots of S positions from `start` on, `open` of them in use. Whether a position is masked
    is state: `committed`, never a comparison with the mask id.

    tokens: the prompt, then masks, then what was committed. A prompt may hold masks too (infilling).
    step: the row's denoising forward that committed each position, -1 for the prompt. logprob: of what it committed.
    top_token, top_logprob: the likeliest tokens there, of which the row may have asked for fewer.
    limit: prompt_length + max_new_tokens. stop_ids: padded with -1. origin: where blocks are counted from.
    canvas_end: of the positions that the row sees, where it reads all of them each time.
    forward_budget: more forwards than any strategy can need: two a position and a block.
    pages_end: positions that `page_table` covers. admitted: rows decode in this order where not all can at once.
    start: of slot 0, where a block starts. cached: positions whose keys and values in the pages are final; a row reads
        its prompt, in chunks, until that is all before `start`.
    block_step: of each slot, the steps it has had since it was activated.
    end: where the output ends, once it is known.
    stopped, failed: why it is done: a stop token; logits that were no numbers, or a strategy that gets nowhere. done
        with neither: the limit. An empty place in the batch is a row that is done.
    starved: it waits for more pages.
    """

    tokens: Int[Array, "*B T"]
    committed: Bool[Array, "*B T"]
    step: Int[Array, "*B T"]
    logprob: Float[Array, "*B T"]
    top_token: Int[Array, "*B T A"]
    top_logprob: Float[Array, "*B T A"]
    prompt_length: _Number
    limit: _Number
    origin: _Number
    canvas_end: _Number
    forward_budget: _Number
    stop_ids: Int[Array, "*B stops"]
    sampling: SamplingParams
    page_table: Int[Array, "*B M"]
    pages_end: _Number
    admitted: _Number
    start: _Number
    open: _Number
    cached: _Number
    block_step: Int[Array, "*B K"]
    denoising_forwards: _Number
    commit_forwards: _Number
    prefill_forwards: _Number
    end: _Number
    stopped: _Flag
    failed: _Flag
    done: _Flag
    starved: _Flag


class RowShape(NamedTuple):
    """Sizes that all rows of a batch share, in entries: T, stop ids, pages a row may have, S, K.

    suppressed, alternatives: the most ids that a row may suppress, and likeliest tokens that it may ask for.
    """

    length: int
    stops: int
    pages: int
    block_size: int
    slots: int
    suppressed: int = 0
    alternatives: int = 0


def make_row(
    prompt: np.ndarray,
    config: DecodingConfig,
    shape: RowShape,
    *,
    rule: tuple[int, CommitRule],
    origin: int,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    mask_token_id: int,
    seed: int,
    float_type: np.dtype,
    given: np.ndarray | None = None,
) -> Rows:
    """One row, numpy, with no pages and nothing cached; done where there is nothing to generate.

    Args:
        rule: the commit rule, and its index among those of the compiled program.
        origin: where blocks are counted from; decoding starts with the block that holds the first mask.
        float_type: of log-probabilities: what logits have.
        given: bool, of the prompt's tokens, those that are there; the others are masks to be filled. None is all.
    """
    number = lambda value: np.asarray(value, np.int32)
    flag = lambda value: np.asarray(value, bool)
    known, limit = len(prompt), len(prompt) + max_new_tokens
    given = np.ones(known, bool) if given is None else given
    first_block = origin + (first_mask(given) - origin) // shape.block_size * shape.block_size
    blocks_end = origin + -(-(limit - origin) // shape.block_size) * shape.block_size
    # A prompt that nothing follows ends where it ends: its last block is not decoded past that.
    committed = np.arange(shape.length) >= limit if max_new_tokens == 0 else np.zeros(shape.length, bool)
    committed[:known] = given
    fields: dict[str, Any] = dict(
        tokens=_padded(prompt, shape.length, mask_token_id),
        committed=committed,
        step=np.full(shape.length, -1, np.int32),
        logprob=np.zeros(shape.length, float_type),
        top_token=np.zeros((shape.length, shape.alternatives), np.int32),
        top_logprob=np.zeros((shape.length, shape.alternatives), float_type),
        prompt_length=number(known),
        limit=number(limit),
        origin=number(origin),
        canvas_end=number(limit if max_new_tokens == 0 else blocks_end),
        forward_budget=number(2 * (limit - min(first_block, known) + shape.block_size)),
        stop_ids=_padded(stop_ids, shape.stops, -1),
        sampling=sampling_params(config, shape.block_size, seed=seed, rule=rule, width=shape.suppressed),
        page_table=np.zeros(shape.pages, np.int32),
        pages_end=number(0),
        admitted=number(0),
        start=number(first_block),
        open=number(0),
        cached=number(0),
        block_step=np.zeros(shape.slots, np.int32),
        denoising_forwards=number(0),
        commit_forwards=number(0),
        prefill_forwards=number(0),
        end=number(limit),
        stopped=flag(False),
        failed=flag(False),
        done=flag(max_new_tokens == 0 and given.all()),
        starved=flag(False),
    )
    return Rows(**fields)


def first_mask(given: np.ndarray) -> int:
    """Where the first token is that is not given; behind all of them if there is none."""
    return len(given) if given.all() else int(given.argmin())


def _padded(values: Sequence[int] | np.ndarray, length: int, fill: int) -> np.ndarray:
    out = np.full(length, fill, np.int32)
    out[: len(values)] = values
    return out


def output(row: Rows, start: int | None = None) -> np.ndarray:
    """What one row, on the host, has without a gap, from its prompt's end or from `start` on."""
    start, end = int(row.prompt_length) if start is None else start, int(row.end)
    committed = np.asarray(row.committed[start:end])
    return np.asarray(row.tokens[start : end if committed.all() else start + int(committed.argmin())])


def top_logprobs(row: Rows, places: slice) -> list[list[tuple[int, float]]] | None:
    """The likeliest tokens at some places of one row, on the host, as many as it asked for; none where none are known.

    Where the token that was committed is one of them, its log-probability is to the last bit that of `logprob`.
    """
    count = int(row.sampling.top_logprobs)
    if not count:
        return None
    steps, own = np.asarray(row.step[places]).tolist(), row.logprob[places].tolist()
    columns = row.tokens[places].tolist(), row.top_token[places].tolist(), row.top_logprob[places].tolist()
    return [
        [(id_, logprob if id_ == token else p) for id_, p in zip(ids[:count], ps[:count], strict=True) if p > -np.inf]
        if step >= 0
        else []
        for step, logprob, token, ids, ps in zip(steps, own, *columns, strict=True)
    ]


class Window(NamedTuple):
    """The K slots of each row, open or not.

    positions: absolute. committed: false past the end of `tokens`. stops: a stop token that ends the row once every
    position before it is committed.
    """

    positions: Int[Array, "B K S"]
    tokens: Int[Array, "B K S"]
    committed: Bool[Array, "B K S"]
    stops: Bool[Array, "B K S"]

    @property
    def decoded(self) -> Int[Array, "B K"]:
        """Committed positions of each slot."""
        return self.committed.sum(axis=-1, dtype=jnp.int32)


def window_of(rows: Rows, block_size: int) -> Window:
    """The window at `start`, from the tokens as they are now."""
    slots = rows.block_step.shape[1]
    positions = rows.start[:, None] + jnp.arange(slots * block_size, dtype=jnp.int32)
    tokens, committed = take(rows.tokens, positions, 0), take(rows.committed, positions, False)
    stops = (tokens[..., None] == rows.stop_ids[:, None]).any(axis=-1) & committed
    stops &= (positions >= rows.prompt_length[:, None]) & (positions < rows.limit[:, None])
    by_slot = lambda x: x.reshape(-1, slots, block_size)
    return Window(*map(by_slot, (positions, tokens, committed, stops)))


def take(x: Array, positions: Int[Array, "B W"], fill: int | bool) -> Array:
    """x[b, positions[b]], and `fill` past the end."""
    return jnp.take_along_axis(x, positions, axis=1, mode="fill", fill_value=fill)
