"""Routing and the experts' matmuls against loops over tokens and experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sdar_jax.experts import (
    ExpertAdapters,
    LowRank,
    balance_loss,
    expert_mlp,
    max_load,
    route,
    route_by_sigmoid,
    router_sums,
    z_loss,
)
from sdar_jax.experts.grouped import grouped_dot
from sdar_jax.experts.mlp import mlp
from sdar_jax.experts.routing import Routing
from tests.experts import oracle

D, F = 6, 4


def drawn(seed: int, tokens: int, experts: int, top_k: int, dtype=jnp.float64):
    """x, gates, gate_up and down, of some size; and experts of each token, no one twice."""
    random = np.random.default_rng(seed)
    shapes = ((tokens, D), (tokens, top_k), (experts, D, 2, F), (experts, F, D))
    chosen = np.stack([random.permutation(experts)[:top_k] for _ in range(tokens)])
    return chosen.astype(np.int32), *(
        jnp.asarray(random.normal(size=shape), dtype) for shape in shapes
    )


def assert_same(ours, theirs, tolerance: float = 1e-11) -> None:
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("skewed", [False, pytest.param(True, marks=pytest.mark.xla_defaults)])
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"), [(1, 8, 3), (7, 4, 2), (13, 3, 3), (150, 5, 1), (300, 2, 1)]
)
def test_values_and_gradients_equal_the_loops(
    tokens: int, experts: int, top_k: int, skewed: bool, x64: None
) -> None:
    """Few tokens and many, more than a tile for an expert; skewed: the same experts for all, none for the others."""
    chosen, *arrays = drawn(tokens, tokens, experts, top_k)
    chosen = np.tile(chosen[:1], (tokens, 1)) if skewed else chosen

    def run(function, experts_first):
        loss = lambda x, *weights: (function(x, experts_first, *weights) ** 2).sum()
        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2, 3)))(*arrays)

    if tokens > 50:
        # The loops, unrolled, would compile for minutes: the same sum over all experts with gates that are zero.
        assert_same(run(mlp, jnp.asarray(chosen)), run(_dense, chosen))
    else:
        assert_same(run(mlp, jnp.asarray(chosen)), run(oracle.expert_mlp, chosen))


@pytest.mark.parametrize("which", ["gate", "up down", "gate up down"])
def test_low_rank_matrices_equal_the_loops_over_merged_weights(which: str, x64: None) -> None:
    """Of values and gradients, of the matrices among them; partly: one of the experts is of another device."""
    chosen, x, gates, gate_up, down = drawn(4, 11, 5, 2)
    random = np.random.default_rng(5)
    inputs, outputs = {"gate": D, "up": D, "down": F}, {"gate": F, "up": F, "down": D}
    adapters = ExpertAdapters(**{
        name: LowRank(
            jnp.asarray(random.normal(size=(4, 3, inputs[name]))),
            jnp.asarray(random.normal(size=(4, outputs[name], 3))),
        )
        for name in which.split()
    })  # fmt: skip

    def ours(x, gates, adapters):
        out = mlp(x, jnp.asarray(chosen), gates, gate_up[:4], down[:4], adapters, partly=True)
        return (out**2).sum()

    def loops(x, gates, adapters):
        added = lambda pair: 0 if pair is None else jnp.einsum("enr,erk->ekn", pair.b, pair.a)
        both = [gate_up[:4, :, 0] + added(adapters.gate), gate_up[:4, :, 1] + added(adapters.up)]
        merged = jnp.stack(both, axis=2), down[:4] + added(adapters.down)
        own = jnp.where(chosen < 4, gates, 0)
        return (oracle.expert_mlp(x, np.minimum(chosen, 3), own, *merged) ** 2).sum()

    found, expected = (
        jax.jit(jax.value_and_grad(function, argnums=(0, 1, 2)))(x, gates, adapters)
        for function in (ours, loops)
    )
    assert_same(found, expected)


def _dense(x, experts, gates, gate_up, down):
    scattered = (
        jnp.zeros((len(x), len(gate_up))).at[jnp.arange(len(x))[:, None], experts].add(gates)
    )
    gate, up = (jnp.einsum("nd,edf->nef", x, gate_up[:, :, i]) for i in (0, 1))
    return jnp.einsum("nef,efd,ne->nd", gate / (1 + jnp.exp(-gate)) * up, down, scattered)


def test_others_experts_add_nothing(x64: None) -> None:
    """What a device that holds experts 2 and 3 of 6 adds is the whole without the others' gates."""
    chosen, x, gates, gate_up, down = drawn(0, 9, 6, 3)
    kept = jnp.where((chosen >= 2) & (chosen < 4), gates, 0)

    def share(x, gate_up, down):
        return (
            mlp(x, jnp.asarray(chosen) - 2, gates, gate_up[2:4], down[2:4], partly=True) ** 2
        ).sum()

    def whole(x, gate_up, down):
        return (oracle.expert_mlp(x, chosen, kept, gate_up, down) ** 2).sum()

    ours, theirs = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1, 2)))(x, gate_up, down) for f in (share, whole)
    )
    assert_same(ours, theirs)


def test_rows_after_the_last_group_are_zero(x64: None) -> None:
    x, weights = jnp.ones((40, 3)), jnp.ones((2, 3, 5))
    value, gradient = jax.value_and_grad(
        lambda x: grouped_dot(x, weights, jnp.array([9, 4]), True).sum()
    )(x)
    assert value == 13 * 3 * 5
    np.testing.assert_array_equal(
        gradient, np.where(np.arange(40)[:, None] < 13, 5.0, 0.0) * np.ones((40, 3))
    )


def test_a_token_does_not_depend_on_its_neighbours(x64: None) -> None:
    chosen, x, gates, gate_up, down = drawn(1, 50, 4, 2)
    together = mlp(x, jnp.asarray(chosen), gates, gate_up, down)
    for i in (0, 17, 49):
        alone = mlp(x[i : i + 1], jnp.asarray(chosen[i : i + 1]), gates[i : i + 1], gate_up, down)
        np.testing.assert_allclose(alone[0], together[i], rtol=1e-13)


def test_bfloat16_is_near_and_stays() -> None:
    chosen, *arrays = drawn(2, 24, 4, 2, jnp.float32)
    x, *rest = (array.astype(jnp.bfloat16) for array in arrays)
    out = expert_mlp(x[None], jnp.asarray(chosen), *rest)
    exact = oracle.expert_mlp(
        x.astype(jnp.float32), chosen, *(array.astype(jnp.float32) for array in rest)
    )
    assert out.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        out[0].astype(jnp.float32), exact, atol=0.03 * float(jnp.abs(exact).max())
    )


@pytest.mark.parametrize("renormalise", [False, True])
def test_routing_is_softmax_then_top_k(renormalise: bool, x64: None) -> None:
    random = np.random.default_rng(3)
    x, router = random.normal(size=(9, D)), random.normal(size=(D, 5))
    routing = route(jnp.asarray(x), jnp.asarray(router), top_k=3, renormalise=renormalise)
    experts, gates = oracle.gates_of(x @ router, 3, renormalise)
    np.testing.assert_array_equal(routing.experts, experts)
    assert_same((routing.logits, routing.gates), (x @ router, gates), 1e-13)
    half = route(
        jnp.asarray(x, jnp.bfloat16),
        jnp.asarray(router, jnp.bfloat16),
        top_k=3,
        renormalise=renormalise,
    )
    assert half.gates.dtype == jnp.bfloat16 and half.logits.dtype == jnp.float32


SIGMOID = {"top_k": 3, "renormalise": True, "groups": 4, "groups_per_token": 2, "scale": 2.5}


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"renormalise": False},
        {"groups": 2, "groups_per_token": 1},
        {"groups": 1, "groups_per_token": 1},
        {"groups_per_token": 4, "scale": 1.0},
        {"top_k": 1},
    ],
    ids=str,
)
def test_routing_by_sigmoid_is_the_loop(changes: dict, x64: None) -> None:
    """Biases as large as scores, so that they choose others than the scores alone would."""
    random = np.random.default_rng(5)
    x, router, bias = (random.normal(size=shape) for shape in ((50, D), (D, 12), (12,)))
    options = SIGMOID | changes
    routing = route_by_sigmoid(jnp.asarray(x), jnp.asarray(router), jnp.asarray(bias), **options)
    experts, gates = oracle.gates_by_sigmoid(x @ router, bias, **options)
    np.testing.assert_array_equal(routing.experts, experts)
    assert_same((routing.logits, routing.gates), (x @ router, gates), 1e-12)
    without, _ = oracle.gates_by_sigmoid(x @ router, 0 * bias, **options)
    assert (np.sort(experts) != np.sort(without)).any(axis=1).mean() > 0.3


def test_a_bias_chooses_and_has_no_gradient(x64: None) -> None:
    random = np.random.default_rng(6)
    x, router, bias = (jnp.asarray(random.normal(size=shape)) for shape in ((9, D), (D, 8), (8,)))

    def total(router, bias):
        return (route_by_sigmoid(x, router, bias, **SIGMOID).gates ** 2).sum()

    d_router, d_bias = jax.grad(total, argnums=(0, 1))(router, bias)
    assert not d_bias.any() and d_router.any()
    # Central differences, in float64; choices do not change on the way.
    step = 1e-6 * jnp.asarray(random.normal(size=router.shape))
    slope = (total(router + step, bias) - total(router - step, bias)) / 2
    np.testing.assert_allclose((d_router * step).sum(), slope, rtol=1e-6)
    half = route_by_sigmoid(*(part.astype(jnp.bfloat16) for part in (x, router)), bias, **SIGMOID)
    assert half.gates.dtype == jnp.bfloat16 and half.logits.dtype == jnp.float32


def test_no_group_is_left_where_all_scores_underflow() -> None:
    routing = route_by_sigmoid(jnp.ones((1, 1)), jnp.full((1, 8), -200.0), jnp.zeros(8), **SIGMOID)
    assert not routing.gates.any()


def test_statistics_leave_padding_out(x64: None) -> None:
    """And the losses over two layers are those of one long row of their tokens."""
    random = np.random.default_rng(4)
    logits, counted = random.normal(size=(2, 11, 4)), random.random((2, 11)) < 0.6
    layers = []
    for own, real in zip(logits, counted, strict=True):
        experts, gates = oracle.gates_of(own, 2, True)
        layers.append(
            router_sums(Routing(*map(jnp.asarray, (own, experts, gates))), jnp.asarray(real))
        )
    sums = jax.tree.map(lambda *parts: jnp.stack(parts), *layers)
    kept = logits[counted]
    probabilities = np.exp(kept) / np.exp(kept).sum(-1, keepdims=True)
    experts, _ = oracle.gates_of(kept, 2, True)
    share = np.bincount(experts.ravel(), minlength=4) / len(kept)
    squares = np.log(np.exp(kept).sum(-1)) ** 2
    assert_same(
        (balance_loss(sums), z_loss(sums)), (4 * share @ probabilities.mean(0), squares.mean())
    )
    busiest = max(slots.max() / slots.mean() for slots in np.asarray(sums.slots))
    assert max_load(sums) == pytest.approx(busiest) and sums.tokens.sum() == counted.sum()
    nothing = jax.tree.map(jnp.zeros_like, sums)
    assert balance_loss(nothing) == z_loss(nothing) == max_load(nothing) == 0


def test_statistics_of_sigmoids_are_their_shares(x64: None) -> None:
    random = np.random.default_rng(7)
    logits = random.normal(size=(9, 4))
    experts, gates = oracle.gates_of(logits, 2, True)
    routing = Routing(*map(jnp.asarray, (logits, experts, gates)))
    sums = router_sums(routing, jnp.arange(9) < 7, "sigmoid")
    scores = 1 / (1 + np.exp(-logits[:7]))
    assert_same(sums.probability, (scores / scores.sum(-1, keepdims=True)).sum(0))


def test_an_even_load_has_the_balance_loss_k(x64: None) -> None:
    logits = jnp.zeros((6, 4))
    experts = jnp.array([[0, 1], [2, 3], [1, 2], [3, 0], [0, 2], [1, 3]], jnp.int32)
    sums = router_sums(Routing(logits, experts, jnp.ones((6, 2))), jnp.ones(6, bool))
    assert balance_loss(sums) == pytest.approx(2) and max_load(sums) == pytest.approx(1)
