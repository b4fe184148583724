"""What a batch of requests is while it decodes: arrays with one entry per sequence, in parts by who owns them."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Int32

from sdar_jax.decoding.commit_rules import CommitRule
from sdar_jax.decoding.config import DecodingConfig, sampling_params
from sdar_jax.decoding.sampling_params import SamplingParams
from sdar_jax.model import LayerPages

_Number = Int32[Array, "*B"]
_Flag = Bool[Array, "*B"]


class SequenceInputs(NamedTuple):
    """What the host gives. The device reads it and never changes it, so nothing of it comes back after a call.

    Attributes:
        prompt_length: tokens of the prompt; some of them may be masks (infilling).
        limit: prompt_length + max_new_tokens.
        origin: where blocks are counted from.
        canvas_end: where the positions end that the sequence sees, if it reads all of them each time.
        forward_budget: more forwards than any strategy can need: two per position and per block.
        stop_ids: stop tokens, padded with -1.
        sampling: the numbers of its `DecodingConfig`.
        page_table: its pages, in order; entries past the last are 0.
        pages_end: positions that `page_table` covers.
        admitted: sequences decode in this order where not all can at once.
    """

    prompt_length: _Number
    limit: _Number
    origin: _Number
    canvas_end: _Number
    forward_budget: _Number
    stop_ids: Int32[Array, "*B stops"]
    sampling: SamplingParams
    page_table: Int32[Array, "*B M"]
    pages_end: _Number
    admitted: _Number


class SequenceProgress(NamedTuple):
    """What the device counts: one number or flag per sequence. All of it comes back after every call, in one transfer.

    The window of a sequence is K slots of S positions from `start` on, `open` of them in use.

    Attributes:
        start: of slot 0, where a block starts.
        open: blocks in the window.
        cached: positions whose keys and values in the pages are final; a sequence reads its prompt, in chunks, until
            that is all before `start`.
        denoising_forwards, commit_forwards, prefill_forwards: forwards so far, by kind.
        end: where the output ends, once it is known; the limit until then.
        stopped: it is done because of a stop token.
        failed: it is done because logits were not finite, or because its strategy gets nowhere.
        done: it has ended, by its limit if it is neither stopped nor failed. An empty slot of the batch is done.
        out_of_pages: it waits until the host raises `pages_end`.
    """

    start: _Number
    open: _Number
    cached: _Number
    denoising_forwards: _Number
    commit_forwards: _Number
    prefill_forwards: _Number
    end: _Number
    stopped: _Flag
    failed: _Flag
    done: _Flag
    out_of_pages: _Flag


class SequenceOutput(NamedTuple):
    """What the device writes for each position. It stays there until the host asks for a sequence.

    Whether a position is masked is state: `committed`, never a comparison with the mask id.

    Attributes:
        tokens: the prompt, then masks, then what was committed.
        committed: positions that hold a token.
        step: the sequence's denoising forward that committed each position, -1 for the prompt.
        logprob: of what that committed.
        top_token, top_logprob: the likeliest tokens there, of which the sequence may have asked for fewer.
        block_step: of each slot of the window, the steps that it has had since it was activated.
    """

    tokens: Int32[Array, "*B T"]
    committed: Bool[Array, "*B T"]
    step: Int32[Array, "*B T"]
    logprob: Float[Array, "*B T"]
    top_token: Int32[Array, "*B T A"]
    top_logprob: Float[Array, "*B T A"]
    block_step: Int32[Array, "*B K"]


class SequenceState(NamedTuple):
    """The state of B sequences; of one, without the leading axis, it is what `make_sequence` makes.

    Which part a field is in says who changes it, and when the host sees it; its dtype is that of its array.
    """

    inputs: SequenceInputs
    progress: SequenceProgress
    output: SequenceOutput

    def with_inputs(self, **changes) -> "SequenceState":
        """The same with some of the inputs replaced."""
        return self._replace(inputs=self.inputs._replace(**changes))

    def with_progress(self, **changes) -> "SequenceState":
        """The same with some of the progress replaced."""
        return self._replace(progress=self.progress._replace(**changes))

    def with_output(self, **changes) -> "SequenceState":
        """The same with some of the output replaced."""
        return self._replace(output=self.output._replace(**changes))


class DecodeState(NamedTuple):
    """All that a call of the device reads and changes. The host may change `batch` between calls.

    Attributes:
        batch: the sequences.
        cache: keys and values of each layer, in pages; they never leave the device. Empty where nothing is cached.
        banned: tokens that are never proposed, besides the mask; None is none.
    """

    batch: SequenceState
    cache: list[LayerPages]
    banned: Bool[Array, " V"] | None = None


class SequenceShape(NamedTuple):
    """Sizes that all sequences of a batch share.

    Attributes:
        length: T, positions.
        stops: stop tokens that a sequence may have.
        pages: M, pages that it may have.
        block_size: S.
        slots: K, blocks of its window.
        suppressed: ids that it may suppress.
        alternatives: A, likeliest tokens that it may ask for.
    """

    length: int
    stops: int
    pages: int
    block_size: int
    slots: int
    suppressed: int = 0
    alternatives: int = 0


def make_sequence(
    prompt: np.ndarray,
    config: DecodingConfig,
    shape: SequenceShape,
    *,
    rule: tuple[int, CommitRule],
    origin: int,
    max_new_tokens: int,
    stop_ids: Sequence[int],
    mask_token_id: int,
    seed: int,
    float_type: np.dtype,
    given: np.ndarray | None = None,
) -> SequenceState:
    """Makes the state of one sequence, numpy, with no pages and nothing cached; done where nothing is to be generated.

    Args:
        rule: the commit rule, and its index among those of the compiled program.
        origin: where blocks are counted from; decoding starts with the block that holds the first mask.
        float_type: of log-probabilities: what logits have.
        given: bool, of the prompt's tokens, those that are there; the others are masks to be filled. None is all.
    """
    known = len(prompt)
    limit = known + max_new_tokens
    given = np.ones(known, bool) if given is None else given
    first_block = origin + (first_mask(given) - origin) // shape.block_size * shape.block_size
    blocks_end = origin + -(-(limit - origin) // shape.block_size) * shape.block_size
    inputs = SequenceInputs(
        prompt_length=_int(known),
        limit=_int(limit),
        origin=_int(origin),
        canvas_end=_int(limit if max_new_tokens == 0 else blocks_end),
        forward_budget=_int(2 * (limit - min(first_block, known) + shape.block_size)),
        stop_ids=_padded(stop_ids, shape.stops, -1),
        sampling=sampling_params(
            config, shape.block_size, seed=seed, rule=rule, width=shape.suppressed
        ),
        page_table=_padded((), shape.pages, 0),
        pages_end=_int(0),
        admitted=_int(0),
    )
    progress = SequenceProgress(
        start=_int(first_block),
        open=_int(0),
        cached=_int(0),
        denoising_forwards=_int(0),
        commit_forwards=_int(0),
        prefill_forwards=_int(0),
        end=_int(limit),
        stopped=_flag(False),
        failed=_flag(False),
        done=_flag(max_new_tokens == 0 and given.all()),
        out_of_pages=_flag(False),
    )
    # A prompt that nothing follows ends where it ends: its last block is not decoded past that.
    committed = _zeros(shape.length, dtype=bool)
    committed[:known] = given
    if max_new_tokens == 0:
        committed[limit:] = True
    output = SequenceOutput(
        tokens=_padded(prompt, shape.length, mask_token_id),
        committed=committed,
        step=_padded((), shape.length, -1),
        logprob=_zeros(shape.length, dtype=float_type),
        top_token=_zeros(shape.length, shape.alternatives, dtype=np.int32),
        top_logprob=_zeros(shape.length, shape.alternatives, dtype=float_type),
        block_step=_zeros(shape.slots, dtype=np.int32),
    )
    return SequenceState(inputs, progress, output)


def _int(value: int) -> Any:
    return np.asarray(value, np.int32)


def _zeros(*shape: int, dtype: Any) -> Any:
    return np.zeros(shape, dtype)


def _flag(value: bool | np.bool) -> Any:
    return np.asarray(value, bool)


def first_mask(given: np.ndarray) -> int:
    """Where the first token is that is not given; behind all of them if there is none."""
    return len(given) if given.all() else int(given.argmin())


def _padded(values: Sequence[int] | np.ndarray, length: int, fill: int) -> Any:
    out = np.full(length, fill, np.int32)
    out[: len(values)] = values
    return out


def generated(sequence: SequenceState, start: int | None = None) -> np.ndarray:
    """What one sequence, on the host, has without a gap, from its prompt's end or from `start` on."""
    start = int(sequence.inputs.prompt_length) if start is None else start
    end = int(sequence.progress.end)
    committed = np.asarray(sequence.output.committed[start:end])
    if not committed.all():
        end = start + int(committed.argmin())
    return np.asarray(sequence.output.tokens[start:end])


def top_logprobs(sequence: SequenceState, places: slice) -> list[list[tuple[int, float]]] | None:
    """The likeliest tokens at some places of one sequence, on the host, as many as it asked for; None if it did not.

    Where the token that was committed is one of them, its log-probability is to the last bit that of `logprob`.
    """
    count = int(sequence.inputs.sampling.top_logprobs)
    if not count:
        return None
    output = sequence.output
    columns = (output.step, output.tokens, output.logprob, output.top_token, output.top_logprob)
    rows = zip(*(np.asarray(column[places]).tolist() for column in columns), strict=True)
    found = []
    for step, token, logprob, ids, ps in rows:
        pairs = list(zip(ids[:count], ps[:count], strict=True)) if step >= 0 else []
        found.append([(id_, logprob if id_ == token else p) for id_, p in pairs if p > -np.inf])
    return found


class Window(NamedTuple):
    """The K slots of each sequence, open or not.

    Attributes:
        positions: absolute.
        tokens: what stands there.
        committed: false past the end of `tokens`.
        stops: a stop token that ends the sequence once every position before it is committed.
    """

    positions: Int[Array, "B K S"]
    tokens: Int[Array, "B K S"]
    committed: Bool[Array, "B K S"]
    stops: Bool[Array, "B K S"]

    @property
    def decoded(self) -> Int[Array, "B K"]:
        """Committed positions of each slot."""
        return self.committed.sum(axis=-1, dtype=jnp.int32)


def window_of(batch: SequenceState, block_size: int) -> Window:
    """The window at `start`, from the tokens as they are now."""
    slots = batch.output.block_step.shape[1]
    positions = batch.progress.start[:, None] + jnp.arange(slots * block_size, dtype=jnp.int32)
    tokens = take(batch.output.tokens, positions, 0)
    committed = take(batch.output.committed, positions, False)
    stops = (tokens[..., None] == batch.inputs.stop_ids[:, None]).any(axis=-1) & committed
    stops &= (positions >= batch.inputs.prompt_length[:, None]) & (
        positions < batch.inputs.limit[:, None]
    )

    def by_slot(x: Array) -> Array:
        return x.reshape(-1, slots, block_size)

    return Window(by_slot(positions), by_slot(tokens), by_slot(committed), by_slot(stops))


def take(x: Array, positions: Int[Array, "B W"], fill: int | bool) -> Array:
    """x[b, positions[b]], and `fill` past the end."""
    return jnp.take_along_axis(x, positions, axis=1, mode="fill", fill_value=fill)


def sequence_at(batch: SequenceState, index: int) -> SequenceState:
    """One sequence of a batch, without the leading axis."""
    return jax.tree.map(lambda x: x[index], batch)
