"""The decoder against itself: ways to run it that must agree."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Array

from sdar_jax.errors import ConfigError
from sdar_jax.model import (
    LayerPages,
    Model,
    Stack,
    Windows,
    empty_pages,
    logits,
    pages_for,
    roll_layers,
    rolls,
    stack_layers,
    unstack_layers,
)
from sdar_jax.model.config import ModelConfig
from sdar_jax.model.quantization import quantize
from sdar_jax.visibility import Ranges, block_causal, hybrid
from tests.tiny import tiny_llada2

CONFIG = ModelConfig(40, 16, 24, 2, 4, 2, 8, qkv_bias=True, initializer_range=0.3)
TOKENS = jax.random.randint(jax.random.key(7), (2, 12), 0, 40, jnp.int32)
ONES = jnp.ones_like(TOKENS)
WEIGHTS = jax.random.normal(jax.random.key(3), (2, 12, 16))
POSITIONS = jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32), (2, 12))


def make(dtype: jnp.dtype = jnp.float32, **changes: object) -> Model:
    return Model(replace(CONFIG, **changes), jax.random.key(0), dtype)


def copy(model: Model) -> Model:
    return jax.tree.map(jnp.copy, model)


run_hidden = jax.jit(Model.hidden, static_argnames=("outputs", "remat", "compute_dtype"))
run_paged = jax.jit(Model.hidden_paged)
run_logits = jax.jit(logits, static_argnames="block_size")


def hidden(model: Model, **options: object) -> Array:
    return run_hidden(model, TOKENS, POSITIONS, block_causal(ONES, 4), **options)


@partial(jax.jit, static_argnames=("outputs", "remat", "compute_dtype"))
def gradient(model: Model, weights: Array = WEIGHTS, **options: object) -> Model:
    """Of a fixed linear functional of the hidden states."""
    return jax.grad(
        lambda model: (hidden(model, **options) * weights[:, : options.get("outputs", 12)]).sum()
    )(model)


def assert_trees_close(a: object, b: object, rtol: float = 1e-5) -> None:
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=0, atol=rtol * float(jnp.abs(y).max()))


@pytest.mark.parametrize("num_layers", [1, 3])
def test_stacked_equals_unstacked(num_layers: int) -> None:
    model = make(num_layers=num_layers)
    stacked = stack_layers(copy(model))
    assert isinstance(stacked.layers, Stack) and (stacked.layers.body is None) == (num_layers == 1)
    np.testing.assert_allclose(hidden(stacked), hidden(model), rtol=1e-5, atol=1e-5)
    if num_layers > 1:
        assert_trees_close(unstack_layers(gradient(stacked)), gradient(model))
    assert_trees_close(unstack_layers(stacked), model, rtol=0)
    assert stack_layers(stacked) is stacked and unstack_layers(model) is model


LLADA2_MODELS = {"one dense": {}, "two dense": {"num_dense_layers": 2}, "four": {"num_layers": 4}}


@pytest.mark.parametrize("changes", LLADA2_MODELS.values(), ids=LLADA2_MODELS)
def test_layers_of_two_shapes_stack(changes: dict, x64: None) -> None:
    """Dense ones first; `two dense` leaves no body between them and the last. Statistics are of layers with experts."""
    model = tiny_llada2(**changes)
    stacked = stack_layers(copy(model))
    dense = model.config.num_dense_layers
    assert (stacked.layers.body is None) == (dense == 2)
    assert len(stacked.layers.first.down[...]) == dense
    assert_trees_close(unstack_layers(stacked), model, rtol=0)
    ours, theirs = (
        run_whole(each, TOKENS % 22, POSITIONS, block_causal(ONES, 4)) for each in (stacked, model)
    )
    assert_trees_close(ours, theirs, rtol=1e-12)
    assert ours[1].tokens.shape == (model.config.num_layers - dense,)
    whole = Model(model.config, jax.random.key(1), jnp.float64, stacked=True)
    assert jax.tree.structure(whole) == jax.tree.structure(stacked)


run_whole = jax.jit(Model.hidden_and_routing)


def test_stacking_frees_what_it_stacked() -> None:
    model = make()
    first, last = model.layers[0].qkv[...], model.layers[-1].qkv[...]
    stacked = stack_layers(model)
    assert first.is_deleted() and not last.is_deleted()
    body = stacked.layers.body.qkv[...]
    unstack_layers(stacked)
    assert not body.is_deleted()
    unstack_layers(stacked, donate=True)
    assert body.is_deleted()


@pytest.mark.parametrize(("remat", "stacked"), [("dots", False), ("full", True)])
def test_remat_changes_nothing(remat: str, stacked: bool) -> None:
    model = stack_layers(make()) if stacked else make()
    np.testing.assert_allclose(hidden(model, remat=remat), hidden(model), rtol=1e-6, atol=1e-6)
    assert_trees_close(gradient(model, remat=remat), gradient(model))


@pytest.mark.usefixtures("unchecked_types")
def test_unknown_remat_is_refused() -> None:
    with pytest.raises(ConfigError, match="'some'.*use one of"):
        make().hidden(TOKENS, POSITIONS, block_causal(ONES, 4), remat="some")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("outputs", "stacked"), [(5, True), (7, False)])
def test_first_outputs_are_a_slice_of_all(outputs: int, stacked: bool) -> None:
    model = stack_layers(make()) if stacked else make()
    few = hidden(model, outputs=outputs)
    assert few.shape == (2, outputs, 16)
    np.testing.assert_allclose(few, hidden(model)[:, :outputs], rtol=1e-5, atol=1e-5)
    expected = gradient(model, WEIGHTS.at[:, outputs:].set(0))
    assert_trees_close(gradient(model, outputs=outputs), expected)


def test_the_last_layer_computes_only_outputs() -> None:
    """Halving the outputs of one layer saves its queries, output projection and MLP, and keeps keys and values."""
    model, ranges = make(num_layers=1, qkv_bias=False), block_causal(ONES, 4)

    def flops(outputs: int) -> float:
        run = run_hidden.lower(model, TOKENS, POSITIONS, ranges, outputs=outputs)
        return run.compile().cost_analysis()["flops"]

    per_position = 2 * 2 * 16 * (4 * 8 + 4 * 8 + 3 * 24)
    assert flops(12) - flops(6) >= 6 * per_position


TABLE = jnp.array([[5, 1, 3, 8], [2, 7, 0, 4]], jnp.int32)


def rubbish_pages(dtype: jnp.dtype, rolled: bool = False) -> list[LayerPages]:
    """Nine pages of four positions."""
    return [LayerPages(k + 9, v + 9) for k, v in empty_pages(CONFIG, 9, 4, dtype, rolled=rolled)]


def windows(start: list[int], width: int, block_size: int, rows: slice = slice(None)) -> Windows:
    """`width` tokens of each of these rows from `start`, block-causal."""
    at = jnp.array(start, jnp.int32)
    places = at[:, None] + jnp.arange(width, dtype=jnp.int32)
    tokens = jnp.take_along_axis(TOKENS[rows], places, axis=1)
    return Windows(
        tokens, at, jnp.full_like(at, width), (places // block_size + 1) * block_size, TABLE[rows]
    )


@pytest.mark.parametrize("rolled", [False, True])
@pytest.mark.parametrize(("block_size", "pieces"), [(1, [5, 6, 1]), (4, [8, 4])])
def test_paged_in_pieces_equals_one_pass(
    block_size: int, pieces: list[int], rolled: bool, x64: None
) -> None:
    """Whole blocks written piece by piece into pages that hold rubbish."""
    model, cache = make(jnp.float64), rubbish_pages(jnp.float64, rolled)
    expected = run_hidden(model, TOKENS, POSITIONS, block_causal(ONES, block_size))
    model = roll_layers(model) if rolled else model
    start = 0
    for length in pieces:
        (out,), cache = run_paged(model, [windows([start] * 2, length, block_size)], cache)
        np.testing.assert_allclose(out, expected[:, start : start + length], rtol=1e-10, atol=1e-10)
        start += length


@pytest.mark.parametrize("rolled", [False, True])
def test_windows_of_several_widths_in_one_forward(rolled: bool, x64: None) -> None:
    """Row 0 goes on from 4 tokens in the pages with two windows of 4; row 1 reads 8 at once, padded to 12."""
    model = make(jnp.float64)
    expected = run_hidden(model, TOKENS, POSITIONS, block_causal(ONES, 4))
    model = roll_layers(model) if rolled else model
    _, cache = run_paged(model, [windows([0], 4, 4, slice(1))], rubbish_pages(jnp.float64, rolled))
    two = jax.tree.map(
        lambda *x: jnp.concatenate(x), *(windows([at], 4, 4, slice(1)) for at in (4, 8))
    )
    long = windows([0], 12, 4, slice(1, 2))
    short = long._replace(count=jnp.array([8], jnp.int32), visible=jnp.minimum(long.visible, 8))
    (first, second), updated = run_paged(model, [two, short], cache)
    np.testing.assert_allclose(first.reshape(8, -1), expected[0, 4:], rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(second[0, :8], expected[1, :8], rtol=1e-10, atol=1e-10)
    # Row 1's third page, past its count, is as it was.
    np.testing.assert_array_equal(updated[0].k[..., TABLE[1, 2], :, :, :], 9)


@pytest.mark.parametrize("changes", [{"qkv_bias": True, "mlp_bias": True}, {"qk_norm": False}])
@pytest.mark.parametrize("quantized", [False, True])
def test_rolled_layers_equal_each_by_itself(changes: dict, quantized: bool, x64: None) -> None:
    """Layers of unlike weights; entries outside the table are no page of any layer."""
    config = replace(CONFIG, num_layers=3, **changes)
    model = jax.tree.map(lambda x: x + 0.01, Model(config, jax.random.key(3), jnp.float64))
    model = quantize(model) if quantized else model
    window = windows([0, 0], 8, 4)._replace(
        page_table=jnp.array([[5, 1, -1, 8], [9, 7, 100, 4]], jnp.int32)
    )
    window = window._replace(visible=jnp.minimum(window.visible, jnp.array([[8], [0]])))

    def run(model: Model, rolled: bool):
        cache = empty_pages(config, 9, 4, jnp.float64, rolled=rolled)
        (hidden,), cache = run_paged(model, [window], cache)
        joined = [jnp.stack(each) for each in zip(*cache, strict=True)]
        return hidden[0], [x[0] if rolled else x for x in joined]

    assert_trees_close(run(roll_layers(model), True), run(model, False), rtol=1e-12)
    assert_trees_close(hidden(roll_layers(model), outputs=9), hidden(model, outputs=9), rtol=1e-12)


def test_pages_are_rolled_where_the_model_is() -> None:
    for model, arrays in (
        (make(num_layers=3), 1),
        (make(num_layers=1), 1),
        (tiny_llada2(jnp.float32), 3),
    ):
        assert rolls(model.config, None) == (model.config.num_layers > arrays)
        assert len(pages_for(model, 9, 4)) == arrays


def test_pages_need_layers_one_by_one() -> None:
    with pytest.raises(ConfigError, match="decode with unstack_layers"):
        stack_layers(make()).hidden_paged([windows([0, 0], 4, 4)], rubbish_pages(jnp.float32))


@pytest.mark.parametrize("stacked", [False, True])
def test_bfloat16_is_near_float32(stacked: bool) -> None:
    """Weights, or compute alone, in bfloat16: 8 bits of mantissa through the layers, and logits still float32."""
    wide = make()
    narrow = jax.tree.map(lambda x: x.astype(jnp.bfloat16), wide)
    wide, narrow = (stack_layers(m) if stacked else m for m in (wide, narrow))
    expected = run_logits(wide, TOKENS, block_size=4)
    scores = run_logits(narrow, TOKENS, block_size=4)
    computed = hidden(wide, compute_dtype=jnp.bfloat16)
    assert scores.dtype == jnp.float32 and computed.dtype == jnp.bfloat16
    for narrow_scores in (scores, wide.unembed(computed)):
        error = jnp.abs(narrow_scores - expected).max() / jnp.abs(expected).max()
        assert 1e-5 < error < 0.05
    if stacked:
        grads = gradient(wide, compute_dtype=jnp.bfloat16)
        assert all(
            leaf.dtype == jnp.float32 and jnp.isfinite(leaf).all()
            for leaf in jax.tree.leaves(grads)
        )


def test_packed_documents_equal_rows_of_their_own() -> None:
    segment_ids = jnp.array([[1] * 5 + [2] * 6 + [0], [3] * 12], jnp.int32)
    model = make()
    packed = run_logits(model, TOKENS, block_size=4, segment_ids=segment_ids)
    np.testing.assert_allclose(
        packed[:1, :5], run_logits(model, TOKENS[:1, :5], block_size=4), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
        packed[:1, 5:11], run_logits(model, TOKENS[:1, 5:11], block_size=4), rtol=1e-4, atol=1e-5
    )
    np.testing.assert_allclose(
        packed[1:], run_logits(model, TOKENS[1:], block_size=4), rtol=1e-4, atol=1e-5
    )


def test_tied_head_is_the_embedding() -> None:
    tied, untied = make(tie_embeddings=True), make()
    untied.head[...] = tied.embedding[...]
    assert tied.head is None
    np.testing.assert_array_equal(tied.output_weights(), untied.output_weights())
    x = jax.random.normal(jax.random.key(1), (2, 3, 16))
    np.testing.assert_allclose(tied.unembed(x), untied.unembed(x), rtol=1e-5, atol=1e-6)


def test_initialisation() -> None:
    model = Model(
        replace(CONFIG, hidden_size=256, initializer_range=0.05, mlp_bias=True),
        jax.random.key(0),
        jnp.bfloat16,
    )
    assert all(leaf.dtype == jnp.bfloat16 for leaf in jax.tree.leaves(model))
    layer = model.layers[1]
    for weight in (model.embedding, model.head, layer.qkv, layer.output, layer.gate_up, layer.down):
        assert float(jnp.std(weight[...].astype(jnp.float32))) == pytest.approx(0.05, rel=0.05)
    assert (
        (model.final_norm[...] == 1).all()
        and (layer.q_norm[...] == 1).all()
        and (layer.down_bias[...] == 0).all()
    )
    assert not jnp.array_equal(model.layers[0].down[...], layer.down[...])


def reaches(visible: np.ndarray, layers: int) -> np.ndarray:
    """Which inputs an output can depend on: itself, by the residual, and what is seen, layer after layer."""
    step = visible | np.eye(len(visible), dtype=bool)
    return np.linalg.matrix_power(step.astype(int), layers) > 0


def dependence(model: Model, ranges: Ranges, positions: Array) -> np.ndarray:
    """[T, T]: whether output i has a gradient to input j. Token j has id j, so row j of the embedding is input j."""
    length = positions.shape[1]
    tokens = jnp.arange(length, dtype=jnp.int32)[None]
    weights = jax.random.normal(jax.random.key(5), (model.config.hidden_size,))

    def outputs(embedding: Array) -> Array:
        probe = jax.tree.map(lambda leaf: leaf, model)
        probe.embedding[...] = embedding
        return probe.hidden(tokens, positions, ranges)[0] @ weights

    jacobian = jax.jit(jax.jacrev(outputs))(model.embedding[...])
    return np.asarray(jnp.abs(jacobian[:, :length]).max(axis=-1) > 0)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("block_size", [1, 2, 4, None])
def test_gradients_respect_blocks(block_size: int | None, stacked: bool) -> None:
    """No gradient from a later block, another document or padding; and one from all else."""
    segments = np.array([1] * 6 + [2] * 9 + [0] * 3)
    starts = np.array([0] * 6 + [6] * 9 + [15] * 3)
    block = (np.arange(18) - starts) // (block_size or 18)
    same = (segments[:, None] == segments[None]) & (segments > 0)
    expected = same & (block[:, None] >= block[None])
    model = stack_layers(make()) if stacked else make()
    positions = jnp.asarray(np.arange(18) - starts, jnp.int32)[None]
    got = dependence(
        model, block_causal(jnp.asarray(segments, jnp.int32)[None], block_size), positions
    )
    np.testing.assert_array_equal(got, reaches(expected, CONFIG.num_layers))


@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_gradients_respect_the_hybrid_layout(block_size: int) -> None:
    """Noisy block b sees itself and clean blocks before b; clean block b sees clean blocks up to b, nothing noisy."""
    block = np.arange(8) // block_size
    later, equal = block[:, None] > block[None], block[:, None] == block[None]
    expected = np.block([[equal, later], [np.zeros_like(equal), equal | later]])
    positions = jnp.tile(jnp.arange(8, dtype=jnp.int32), 2)[None]
    got = dependence(make(), hybrid(jnp.ones((1, 8), jnp.int32), block_size), positions)
    np.testing.assert_array_equal(got, reaches(expected, CONFIG.num_layers))
    np.testing.assert_array_equal(reaches(expected, CONFIG.num_layers), expected)


@pytest.mark.parametrize("sparse", [False, True])
def test_a_bad_document_leaves_the_others_of_its_row(sparse: bool) -> None:
    """An id outside the vocabulary, of padding or of a document, is NaN to itself and nothing to others."""
    experts = {
        "architecture": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_token": 2,
        "moe_intermediate_size": 8,
    }
    model = make(**(experts if sparse else {}))
    segment_ids = jnp.array([[1] * 5 + [2] * 4 + [0] * 3], jnp.int32)
    wanted = run_logits(model, TOKENS[:1], block_size=2, segment_ids=segment_ids)
    got = run_logits(
        model, TOKENS[:1].at[0, 6].set(40).at[0, 10].set(-1), block_size=2, segment_ids=segment_ids
    )
    np.testing.assert_array_equal(got[0, :5], wanted[0, :5])
    assert np.isnan(got[0, [6, 7, 8, 10]]).all()
    ranges, sums = block_causal(segment_ids, 2), partial(run_routing, model)
    positions = POSITIONS[:1]
    for ours, theirs in zip(
        jax.tree.leaves(sums(TOKENS[:1].at[0, 10].set(-1), positions, ranges)),
        jax.tree.leaves(sums(TOKENS[:1], positions, ranges)),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)


run_routing = jax.jit(lambda model, *read: model.hidden_and_routing(*read)[1])
