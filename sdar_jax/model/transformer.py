"""The Qwen3 / SDAR decoder as a pytree of weights, and two forwards: over rows, and over windows of paged sequences.

Shapes: B rows, T tokens, D hidden, G key-value heads, K head dimension, V vocabulary.

Training stacks the layers and scans them (`stack_layers`), those of one shape at once: all but the last, which may
compute fewer outputs than inputs. Decoding holds them one by one, as a scan would copy each layer's weights out of the
stack; on a CPU in a loop of its own (`rolled.RolledLayers`).
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from sdar_jax import visibility
from sdar_jax.attention import attention
from sdar_jax.attention.paged import paged_attention, write_pages
from sdar_jax.devices.sharding import HIDDEN_STATES, PAGES, constrain, current_mesh, mesh_of, named
from sdar_jax.errors import ConfigError
from sdar_jax.experts import RouterSums, router_sums
from sdar_jax.model.axes import gathered, not_gathered
from sdar_jax.model.config import ModelConfig
from sdar_jax.model.embedding import embed
from sdar_jax.model.layer import Layer, LayerPages, normal_param, rms_norm
from sdar_jax.model.matmul import dot
from sdar_jax.model.quantization import dequantized
from sdar_jax.model.rolled import RolledLayers, rolls
from sdar_jax.model.rope import rope_tables
from sdar_jax.visibility import Ranges

Remat = Literal["none", "dots", "full"]


class Windows(NamedTuple):
    """The input of a paged forward: W consecutive tokens of each of N sequences. All int32.

    Attributes:
        tokens: [N, W].
        start: [N], position of the first token.
        count: [N], how many of the W are real; only their keys and values are written.
        visible: [N, W], how many of the first keys of its sequence each token sees, the window's own included.
        page_table: [N, M], as for `paged_attention`.
        positions: [N, W], given where those past `count` are read without being written and are elsewhere; None:
            from `start` on.
    """

    tokens: Int[Array, "N W"]
    start: Int[Array, " N"]
    count: Int[Array, " N"]
    visible: Int[Array, "N W"]
    page_table: Int[Array, "N M"]
    positions: Int[Array, "N W"] | None = None


class Stack(nnx.Module):
    """The layers for training, those of one shape on a leading axis.

    Attributes:
        first: the dense layers that an MoE begins with; None if there are none.
        body: all others but the last; None if there are none.
        last: the last.
    """

    def __init__(self, first: Layer | None, body: Layer | None, last: Layer):
        self.first = nnx.data(first)
        self.body = nnx.data(body)
        self.last = last


class Model(nnx.Module):
    """A decoder with random weights; `load_pretrained` fills one from a directory.

    Args:
        config: its shape and purpose.
        key: for the normal initialisation of scale `config.initializer_range`.
        dtype: of the weights.
        stacked: layers as `stack_layers` gives them; quicker to compile than one by one.
    """

    def __init__(
        self,
        config: ModelConfig,
        key: jax.Array,
        dtype: DTypeLike = jnp.float32,
        *,
        stacked: bool = False,
    ):
        normal = partial(normal_param, scale=config.initializer_range, dtype=dtype)
        keys = jax.random.split(key, config.num_layers + 2)
        self.config = config
        self.embedding = normal(keys[0], config.vocab_size, config.hidden_size)

        def layer(key: jax.Array, sparse: bool) -> Layer:
            return Layer(config, key, dtype, sparse=sparse)

        def several(keys: jax.Array, sparse: bool) -> Layer | None:
            return jax.vmap(partial(layer, sparse=sparse))(keys) if len(keys) else None

        if stacked:
            sparse, dense = config.num_experts > 0, 2 + config.num_dense_layers
            first, body = several(keys[2:dense], False), several(keys[dense:-1], sparse)
            self.layers: nnx.List | Stack = Stack(first, body, layer(keys[-1], sparse))
        else:
            kinds = [config.has_experts(i) for i in range(config.num_layers)]
            self.layers = nnx.List([layer(*each) for each in zip(keys[2:], kinds, strict=True)])
        self.final_norm = nnx.Param(jnp.ones(config.hidden_size, dtype))
        self.head = (
            None
            if config.tie_embeddings
            else normal(keys[1], config.hidden_size, config.vocab_size, inputs=1)
        )

    def hidden(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        ranges: Ranges,
        **options: Any,
    ) -> Float[Array, "B outputs D"]:
        """Computes the hidden states of `hidden_and_routing`, whose options these are, without the routing."""
        hidden, _ = self.hidden_and_routing(tokens, positions, ranges, **options)
        return hidden

    def hidden_and_routing(
        self,
        tokens: Int[Array, "B T"],
        positions: Int[Array, "B T"],
        ranges: Ranges,
        *,
        outputs: int | None = None,
        remat: Remat = "none",
        compute_dtype: DTypeLike | None = None,
    ) -> tuple[Float[Array, "B outputs D"], RouterSums | None]:
        """Computes the hidden states, after the last norm, of the first `outputs` positions (all if None).

        What the others need in the last layer beyond their keys and values is not computed.

        Args:
            tokens: int32 [B, T].
            positions: int32 [B, T].
            ranges: what each of the T positions sees of the same T.
            remat: what the backward pass recomputes: "none", all but matmul outputs ("dots"), or full layers ("full").
            compute_dtype: of activations and matmuls; the weights' own if None. Norms and softmax are float32.

        Returns:
            [B, outputs, D], and the statistics of each layer's router over the positions it computes that see
            anything; None for a dense model.
        """
        outputs = tokens.shape[1] if outputs is None else outputs
        x = constrain(self.embed(tokens, compute_dtype), *HIDDEN_STATES)
        rope = rope_tables(self.config, positions, x.dtype)
        inner = _rematerialised(partial(_layer_forward, outputs=None), remat)
        last = _rematerialised(partial(_layer_forward, outputs=outputs), remat)
        sums = []
        if isinstance(self.layers, Stack):
            for part in (self.layers.first, self.layers.body):
                if part is not None:
                    x, part_sums = jax.lax.scan(
                        lambda x, layer: inner(layer, x, rope, ranges), x, part
                    )
                    sums.append(part_sums)
            x, last_sums = last(self.layers.last, x, rope, ranges)
            sums.append(jax.tree.map(lambda leaf: leaf[None], last_sums))
            routing = _joined(jnp.concatenate, sums)
        elif isinstance(rolled := self.layers, RolledLayers):
            one_layer = lambda i, x: _layer_forward(rolled.at(i), x, rope, ranges, None)[0]
            x = jax.lax.fori_loop(0, self.config.num_layers, one_layer, x)[:, :outputs]
            routing = None
        else:
            for layer in list(self.layers)[:-1]:
                x, layer_sums = inner(layer, x, rope, ranges)
                sums.append(layer_sums)
            x, last_sums = last(self.layers[-1], x, rope, ranges)
            routing = _joined(jnp.stack, [*sums, last_sums])
        return rms_norm(x, self.final_norm, self.config.rms_norm_eps), routing

    def hidden_paged(
        self, windows: Sequence[Windows], cache: list[LayerPages], wanted: int | None = None
    ) -> tuple[list[Float[Array, "N W D"]], list[LayerPages]]:
        """Computes the hidden states of windows of tokens, of one or more widths, over keys and values kept in pages.

        All keys and values are written before any are read, so windows of one sequence see each other. Matmuls run over
        the tokens of all windows as one. Needs layers one by one (`unstack_layers`).

        Args:
            windows: what is read, one or more widths.
            cache: as `empty_pages` makes it, rolled where the layers are.
            wanted: only the first so many of `windows` need hidden states, the others leave the last layer with their
                keys and values (rolled layers compute them all the same); None is all.

        Returns:
            The hidden states [N, W, D] of each that is wanted, undefined past its `count`; and the pages, written in
            place where the given ones are donated.

        Raises:
            ConfigError: the layers are stacked.
        """
        if isinstance(self.layers, Stack):
            raise ConfigError(
                "the layers are stacked for training; decode with unstack_layers(model)"
            )
        positions = [_positions(w) for w in windows]
        x = self.embed(_concatenated([w.tokens for w in windows]))
        rope = rope_tables(self.config, _concatenated(positions), x.dtype)
        if isinstance(self.layers, RolledLayers):
            x, cache = _rolled(self.layers, x, rope, windows, cache)
        else:
            x, cache = _unrolled(list(self.layers), x, rope, windows, cache, wanted)
        hidden = rms_norm(x, self.final_norm, self.config.rms_norm_eps)
        return _split(hidden, windows[:wanted]), cache

    def embed(
        self, tokens: Int[Array, "B T"], compute_dtype: DTypeLike | None = None
    ) -> Float[Array, "B T D"]:
        """Looks up token embeddings, in the dtype that the rest of the forward computes in."""
        return embed(self.embedding[...], tokens, compute_dtype or self.embedding.dtype)

    def output_weights(self) -> Float[Array, "V D"]:
        """Returns the output head, which is the embedding if they are tied."""
        return self.embedding[...] if self.head is None else dequantized(self.head[...])

    def unembed(self, hidden: Float[Array, "*B D"]) -> Float[Array, "*B V"]:
        """Computes logits, accumulated and returned in float32 (float64 for float64 weights)."""
        accumulate = jnp.promote_types(hidden.dtype, jnp.float32)
        head = self.embedding if self.head is None else self.head
        return dot(hidden, head, accumulate=accumulate)


def empty_pages(
    config: ModelConfig,
    pages: int,
    page_size: int,
    dtype: DTypeLike,
    mesh: Mesh | None = None,
    *,
    rolled: bool = False,
) -> list[LayerPages]:
    """Makes zeros for `pages` of `page_size` positions in every layer, split over `mesh` by key-value heads.

    For rolled layers they are one pair of arrays, with the layers on a leading axis.
    """
    shape = (pages, config.num_kv_heads, page_size, config.head_dim)
    place = None if mesh is None else named(mesh, PAGES, shape)
    if rolled:
        return _zero_pages(1, (config.num_layers, *shape), jnp.dtype(dtype), place)
    return _zero_pages(config.num_layers, shape, jnp.dtype(dtype), place)


def pages_for(model: Model, pages: int, page_size: int) -> list[LayerPages]:
    """Makes empty pages for a model that decodes where it lies."""
    dtype, mesh = model.embedding.dtype, mesh_of(model.embedding)
    rolled = rolls(model.config, mesh)
    return empty_pages(model.config, pages, page_size, dtype, mesh, rolled=rolled)


# One program for all: dispatching a fill for each takes a small model's forward.
@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _zero_pages(
    count: int, shape: tuple[int, ...], dtype: np.dtype, place: NamedSharding | None
) -> list[LayerPages]:
    zeros = partial(jnp.zeros, shape, dtype, device=place)
    return [LayerPages(zeros(), zeros()) for _ in range(count)]


def stack_layers(model: Model) -> Model:
    """Stacks a model's layers for training. Donates: the given model's layer weights are freed."""
    if isinstance(model.layers, Stack):
        return model
    layers, dense = list(model.layers), model.config.num_dense_layers
    first, body = (
        jax.tree.map(_stack_donated, *part) if part else None
        for part in (layers[:dense], layers[dense:-1])
    )
    return _with_layers(model, Stack(first, body, layers[-1]))


def unstack_layers(model: Model, *, donate: bool = False) -> Model:
    """Splits a model's layers into single ones for decoding; `donate` frees the stacked weights on the way."""
    if not isinstance(model.layers, Stack):
        return model
    layers = []
    for stacked in (model.layers.first, model.layers.body):
        leaves, tree = jax.tree.flatten(stacked)
        parts = [_split_stacked(leaf, donate) for leaf in leaves]
        layers += [jax.tree.unflatten(tree, list(part)) for part in zip(*parts, strict=True)]
    return _with_layers(model, nnx.List([*layers, model.layers.last]))


def roll_layers(model: Model) -> Model:
    """Puts a model's layers, one by one before, into a loop (`rolls`)."""
    assert isinstance(model.layers, nnx.List)
    return _with_layers(model, RolledLayers(list(model.layers)))


def _with_layers(model: Model, layers: nnx.Pytree) -> Model:
    new = jax.tree.map(lambda leaf: leaf, model)
    new.layers = layers
    return new


def _stack_donated(*parts: Array) -> Array:
    stacked = jnp.stack(parts)
    stacked.block_until_ready()
    for part in parts:
        part.delete()
    return stacked


def _split_stacked(leaf: Array, donate: bool) -> list[Array]:
    parts = jax.block_until_ready([leaf[i] for i in range(len(leaf))])
    if donate:
        leaf.delete()
    return parts


def logits(
    model: Model,
    tokens: Int[Array | np.ndarray, "B L"],
    *,
    block_size: int | None,
    segment_ids: Int[Array | np.ndarray, "B L"] | None = None,
) -> Float[Array, "B L V"]:
    """Computes one clean pass; the logits of each position are in place, before any shift.

    Args:
        tokens: int32 [B, L].
        block_size: 1 is causal, S block-causal, None bidirectional.
        segment_ids: int32 [B, L], > 0 and contiguous for each document, 0 for padding; a document starts its own
            positions and blocks. None: a row is one document.

    Returns:
        float32 [B, L, V] (float64 for float64 weights).
    """
    tokens = jnp.asarray(tokens, jnp.int32)
    segment_ids = (
        jnp.ones_like(tokens) if segment_ids is None else jnp.asarray(segment_ids, jnp.int32)
    )
    positions = visibility.segments(segment_ids).positions
    ranges = visibility.block_causal(segment_ids, block_size)
    return model.unembed(model.hidden(tokens, positions, ranges))


def _layer_forward(
    layer: Layer, x: Array, rope: tuple[Array, Array], ranges: Ranges, outputs: int | None
) -> tuple[Array, RouterSums | None]:
    seen = Ranges(ranges.start[:, :outputs], ranges.end[:, :outputs])
    layer = gathered(layer, x.dtype)
    x, _, routing = layer(x, rope, lambda q, k, v: (attention(q, k, v, seen), None), outputs)
    x = constrain(x, *HIDDEN_STATES)
    if routing is None:
        return x, None
    sees_anything = (seen.end > seen.start).any(axis=-1)
    return x, router_sums(routing, sees_anything.reshape(-1), layer.score_function)


def _joined(
    join: Callable[[list[Array]], Array], sums: list[RouterSums | None]
) -> RouterSums | None:
    """Puts the statistics of layers together; dense ones have none."""
    found = [each for each in sums if each is not None]
    return jax.tree.map(lambda *parts: join(list(parts)), *found) if found else None


def _unrolled(
    layers: list[Layer],
    x: Array,
    rope: tuple[Array, Array],
    windows: Sequence[Windows],
    cache: list[LayerPages],
    wanted: int | None,
) -> tuple[Array, list[LayerPages]]:
    updated = []
    for i, (layer, pages) in enumerate(zip(layers, cache, strict=True)):
        reading = windows[:wanted] if i == len(cache) - 1 else windows
        x, pages, _ = layer(x, rope, partial(_attend_paged, windows, reading, pages))
        updated.append(pages)
    return x, updated


def _rolled(
    rolled: RolledLayers,
    x: Array,
    rope: tuple[Array, Array],
    windows: Sequence[Windows],
    cache: list[LayerPages],
) -> tuple[Array, list[LayerPages]]:
    """Reads all layers as pages of one pool, those of layer i from `i` times their number on."""
    (pool,) = cache
    layers, pages = pool.k.shape[0], pool.k.shape[1]
    inside = [(w.page_table >= 0) & (w.page_table < pages) for w in windows]

    def one_layer(i: Array, carry: tuple[Array, LayerPages]) -> tuple[Array, LayerPages]:
        x, flat = carry
        tables = [
            jnp.where(there, w.page_table + i * pages, layers * pages)
            for w, there in zip(windows, inside, strict=True)
        ]
        here = [w._replace(page_table=t) for w, t in zip(windows, tables, strict=True)]
        x, written, _ = rolled.at(i)(x, rope, partial(_attend_paged, here, here, flat))
        assert written is not None
        return x, written

    flat = LayerPages(*(each.reshape(-1, *each.shape[2:]) for each in pool))
    x, flat = jax.lax.fori_loop(0, layers, one_layer, (x, flat))
    return x, [LayerPages(*(new.reshape(pool.k.shape) for new in flat))]


def _attend_paged(
    windows: Sequence[Windows], reading: Sequence[Windows], pages: LayerPages, q, k, v
):
    """Writes the keys and values of all windows, and attends from the first of them, `reading`."""
    for w, new_k, new_v in zip(windows, _split(k, windows), _split(v, windows), strict=True):
        pages = LayerPages(*write_pages(*pages, new_k, new_v, w.page_table, w.start, w.count))
    attended = [
        paged_attention(part, *pages, w.page_table, w.visible)
        for w, part in zip(reading, _split(q, reading), strict=True)
    ]
    return _concatenated(attended, q[:, :0]), pages


def _positions(window: Windows) -> Int[Array, "N W"]:
    if window.positions is not None:
        return window.positions
    return window.start[:, None] + jnp.arange(window.tokens.shape[1], dtype=jnp.int32)


def _concatenated(parts: Sequence[Array], none: Array | None = None) -> Array:
    """Joins [N, W, ...] of each window into one row of tokens, [1, T, ...]; gives `none` where there are no windows."""
    if not parts and none is not None:
        return none
    return jnp.concatenate([part.reshape(1, -1, *part.shape[2:]) for part in parts], axis=1)


def _split(x: Array, windows: Sequence[Windows]) -> list[Array]:
    """Inverts `_concatenated`; where `windows` are only the first of the row, the rest of it is left out."""
    ends = np.cumsum([w.tokens.size for w in windows]).tolist()
    parts = [x[:, end - w.tokens.size : end] for w, end in zip(windows, ends, strict=True)]
    return [
        part.reshape(*w.tokens.shape, *x.shape[2:]) for part, w in zip(parts, windows, strict=True)
    ]


def _rematerialised(function: Callable, remat: Remat) -> Callable:
    if remat == "none":
        return function if current_mesh() is None else jax.checkpoint(function, policy=not_gathered)
    policies = {"dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable, "full": None}
    if remat not in policies:
        raise ConfigError(f"remat {remat!r} is unknown; use one of ('none', 'dots', 'full')")
    return jax.checkpoint(function, policy=policies[remat])
