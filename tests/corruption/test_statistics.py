"""Corruption policies: what holds on average. Seeds are fixed; a bound is four standard errors or an exact variance."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from sdar_jax.corruption import CorruptionConfig, _beta_quantile, corrupt

draw = partial(jax.jit, static_argnames=("config", "block_size"))(corrupt)


def whole_rows(
    rows: int, length: int, config: CorruptionConfig, seed: int = 0, block_size: int | None = 4
):
    """masked and weights of rows of one document, all with loss."""
    ids = jnp.ones((rows, length), jnp.int32)
    out = draw(ids, ids > 0, jax.random.key(seed), config, block_size=block_size)
    return np.asarray(out.masked), np.asarray(out.weights, np.float64)


def assert_mean(samples: np.ndarray, expected: float, at_most: float) -> None:
    """The mean of independent samples is within 4 standard errors, and these are small enough to mean something."""
    error = samples.std(ddof=1) / np.sqrt(len(samples))
    assert error < at_most
    assert abs(samples.mean() - expected) < 4 * error


@pytest.mark.parametrize(
    "policy",
    [
        dict(level="row"),
        dict(level="block", draw="stratified"),
        dict(level="block", t_min=0.2, t_max=0.9, complementary=True),
        dict(level="document", t_min=0.05, t_max=0.95, draw="stratified", complementary=True),
        dict(level="row", distribution="beta", beta=(2.0, 5.0), t_min=0.1),
    ],
    ids=lambda policy: "-".join(map(str, policy.values())),
)
def test_a_bound_weighs_each_token_once(policy):
    """E[weight] = 1 for each token with loss, in each view, however t is drawn."""
    config = CorruptionConfig(**policy, at_least_one=False)
    _, weights = whole_rows(8192, 8, config)
    for view in range(config.views):
        assert_mean(weights[view :: config.views].mean(axis=1), 1.0, at_most=0.03)


@pytest.mark.parametrize("distribution", ["uniform", "beta"])
def test_exact_picks_any_token_alike(distribution):
    config = CorruptionConfig(
        level="row", mask="exact", distribution=distribution, beta=(2.0, 1.0), at_least_one=False
    )
    masked, weights = whole_rows(4096, 5, config)
    for position in range(5):
        assert_mean(weights[:, position], 1.0, at_most=0.03)
    counts = masked.sum(axis=1)
    # P(k) is the chance that ceil(5 t) = k.
    edges = np.linspace(0, 1, 6) if distribution == "uniform" else np.linspace(0, 1, 6) ** 2
    _, p = scipy.stats.chisquare(np.bincount(counts, minlength=6)[1:], 4096 * np.diff(edges))
    assert p > 1e-3


def test_bernoulli_masks_with_probability_t():
    """Given t = 1 / weight, the masked of 256 tokens are binomial: standardised, mean 0 and variance 1."""
    masked, weights = whole_rows(2048, 256, CorruptionConfig(level="row", t_min=0.05, t_max=0.95))
    t = 1 / weights.max(axis=1)
    z = (masked.sum(axis=1) - 256 * t) / np.sqrt(256 * t * (1 - t))
    assert_mean(z, 0.0, at_most=0.03)
    assert_mean(z**2, 1.0, at_most=0.05)
    assert scipy.stats.kstest(t, scipy.stats.uniform(0.05, 0.9).cdf).pvalue > 1e-3


def test_the_default_range_is_the_papers():
    """p = eps + (1 - eps) U, eps = 1e-3: no weight is over 1000, and t is uniform over the range."""
    _, weights = whole_rows(4096, 1024, CorruptionConfig(level="row"))
    t = 1 / weights.max(axis=1)
    assert weights.max() <= 1000 * (1 + 1e-6) and t.min() < 0.005 and t.max() > 0.999
    assert scipy.stats.kstest(t, scipy.stats.uniform(1e-3, 0.999).cdf).pvalue > 1e-3


@pytest.mark.parametrize("mask", ["bernoulli", "exact"])
def test_a_clipped_range_is_kept(mask):
    _masked, weights = whole_rows(
        512, 200, CorruptionConfig(level="row", mask=mask, t_min=0.3, t_max=0.6)
    )
    share = 1 / weights.max(axis=1)
    assert share.min() >= 0.3 * (1 - 1e-6) and share.max() <= 0.6 * (1 + 1e-6)
    assert share.min() < 0.31 and share.max() > 0.59


def test_unit_weights_are_one():
    masked, weights = whole_rows(64, 16, CorruptionConfig(weighting="unit", complementary=True))
    np.testing.assert_array_equal(weights, masked)


@pytest.mark.parametrize("a, b", [(1.0, 1.0), (2.0, 3.0), (0.5, 0.5), (5.0, 1.0), (30.0, 20.0)])
def test_beta_quantiles(a, b):
    """The distribution function at our quantile gives the probability back, to float32's accuracy in betainc."""
    probability = np.linspace(0.01, 0.99, 99).astype(np.float32)
    quantile = np.asarray(_beta_quantile(jnp.asarray(probability), a, b), np.float64)
    exact = scipy.stats.beta.ppf(probability, a, b)
    slope = scipy.stats.beta.pdf(exact, a, b)
    assert (abs(quantile - exact) < 2**-24 + 1e-5 / slope + 1e-6 * exact).all()


def test_beta_levels_are_beta_distributed():
    config = CorruptionConfig(level="row", distribution="beta", beta=(3.0, 4.0), at_least_one=False)
    _, weights = whole_rows(1024, 256, config)
    t = 1 / weights.max(axis=1)
    assert scipy.stats.kstest((t - 1e-3) / 0.999, scipy.stats.beta(3, 4).cdf).pvalue > 1e-3


def noise_levels(draw_: str, seed: int, rows: int = 64) -> np.ndarray:
    """t of each row, to 1/512: ceil(512 t) of 512 tokens are masked."""
    config = CorruptionConfig(level="row", mask="exact", draw=draw_)
    return whole_rows(rows, 512, config, seed)[0].mean(axis=1)


def test_stratified_levels_cover_evenly():
    """Golden-ratio multiples: no part of [0, 1] is left out by more than a few of 64, whatever the offset."""
    for seed in range(8):
        t = np.sort(noise_levels("stratified", seed))
        assert abs(t - (np.arange(64) + 0.5) / 64).max() < 2 / 64 + 1 / 512
    worst = max(
        abs(np.sort(noise_levels("independent", seed)) - (np.arange(64) + 0.5) / 64).max()
        for seed in range(8)
    )
    assert worst > 4 / 64


def test_units_without_tokens_with_loss_take_no_stratum():
    """Every 13th row of 832 alone has loss, as prompts are not: those 64 levels cover evenly all the same.

    Numbered with the rest, they would not: 13 times the golden ratio is nearly a whole number.
    """
    ids = jnp.ones((832, 128), jnp.int32)
    chosen = jnp.arange(832) % 13 == 0
    config = CorruptionConfig(level="row", mask="exact", draw="stratified")
    masked = draw(
        ids, jnp.broadcast_to(chosen[:, None], ids.shape), jax.random.key(0), config, block_size=4
    ).masked
    t = np.sort(np.asarray(masked)[chosen].mean(axis=1))
    assert abs(t - (np.arange(64) + 0.5) / 64).max() < 2 / 64 + 1 / 128


def test_stratified_means_vary_less():
    """The mean of 64 independent levels has variance 1 / (12 * 64); of stratified ones at most a twentieth of that."""
    means = {
        name: [noise_levels(name, seed).mean() for seed in range(60)]
        for name in ("independent", "stratified")
    }
    independent, stratified = (np.var(means[name]) for name in ("independent", "stratified"))
    assert 0.6 < independent * 12 * 64 < 1.6
    assert stratified < independent / 20


def test_each_stratified_level_is_uniform():
    """Over keys, one row's own t is uniform: stratifying biases nothing."""
    t = [noise_levels("stratified", seed, rows=4)[2] for seed in range(300)]
    assert scipy.stats.kstest(t, "uniform").pvalue > 1e-3


def test_at_least_one():
    """At t <= 0.01 and 6 tokens, 95 of 100 rows come out empty; ten redraws and a forced choice mend every one."""
    thin = dict(level="row", t_min=1e-3, t_max=0.01)
    before, _ = whole_rows(4096, 6, CorruptionConfig(**thin, at_least_one=False))
    after, weights = whole_rows(4096, 6, CorruptionConfig(**thin))
    full = before.any(axis=1)
    assert full.mean() < 0.1 and after.any(axis=1).all()
    np.testing.assert_array_equal(after[full], before[full])
    assert weights.max() <= 1000 * (1 + 1e-6)
    _, p = scipy.stats.chisquare(after[~full].sum(axis=0))
    assert p > 1e-3


def test_redraws_come_before_force():
    """An empty row is drawn again whole: rows mended by a redraw may have more than one token masked."""
    config = dict(level="row", t_min=0.1, t_max=0.2)
    before, _ = whole_rows(4096, 6, CorruptionConfig(**config, at_least_one=False))
    after, _ = whole_rows(4096, 6, CorruptionConfig(**config))
    mended = after[~before.any(axis=1)].sum(axis=1)
    several = (before.sum(axis=1) > 1).mean() / before.any(axis=1).mean()
    assert (
        abs((mended > 1).mean() - several)
        < 4 * np.sqrt(several * (1 - several) / len(mended)) + 0.02
    )


LONG = 400  # tokens of a block, so that the share masked is its t


def shares_of_blocks(config: CorruptionConfig, blocks: int, group: int, seed: int = 0):
    """The masked share [rows, blocks] of rows of one document, in groups of so many blocks."""
    rows = 3000
    ids = jnp.ones((rows, blocks * LONG), jnp.int32)
    starts = jnp.arange(blocks * LONG) // (group * LONG) * (group * LONG)
    out = draw(
        ids,
        ids > 0,
        jax.random.key(seed),
        config,
        block_size=LONG,
        group_start=jnp.broadcast_to(starts, ids.shape),
    )
    return np.asarray(out.masked).reshape(rows, blocks, LONG).mean(axis=2)


@pytest.mark.parametrize(("draw", "before"), [("chain_uniform", 1), ("chain_uniform_opt", 0)])
def test_noise_of_a_chain(draw, before):
    """Block j of a group is behind j + 1 uniforms, and the floor: E[t_max - t] halves with each."""
    low, high = 0.1, 0.9
    config = CorruptionConfig(
        level="block", draw=draw, mask="floor", t_min=low, t_max=high, at_least_one=False
    )
    shares = shares_of_blocks(config, blocks=5, group=3)
    for block, place in enumerate([0, 1, 2, 0, 1]):
        draws = place + 1 + before
        # The floor takes half a token on average.
        assert_mean(shares[:, block] + 0.5 / LONG, high - (high - low) / 2**draws, at_most=0.005)
        # E[(t_max - t)^2] = (t_max - t_min)^2 / 3^draws, as of a product of uniforms.
        second = (high - shares[:, block] - 0.5 / LONG) ** 2
        assert_mean(second, (high - low) ** 2 / 3**draws, at_most=0.005)
    for first, later in [(0, 1), (1, 2), (3, 4)]:
        assert (shares[:, first] <= shares[:, later]).all()
    assert np.corrcoef(shares[:, 2], shares[:, 3])[0, 1] < 0.1
    assert np.corrcoef(shares[:, 1], shares[:, 2])[0, 1] > 0.4


def test_monotone_noise():
    """p_0 = 0.2 + U / 2, then steps of at most (0.7 - p_0) / (N - 1): E[p_j] = p_0 + j (0.7 - p_0) / 2 (N - 1)."""
    config = CorruptionConfig(
        level="block", draw="monotone", mask="floor", t_min=0.2, t_max=0.7, at_least_one=False
    )
    shares = shares_of_blocks(config, blocks=4, group=4) + 0.5 / LONG
    for block in range(4):
        assert_mean(shares[:, block], 0.45 + block * 0.25 / 6, at_most=0.005)
    steps = np.diff(shares, axis=1)
    assert (steps >= -1 / LONG).all()
    assert (steps <= (0.7 - shares[:, :1]) / 3 + 1 / LONG).all()


def test_monotone_steps_are_of_the_batch_s_longest_document():
    ids = jnp.array([[1] * 8 + [0] * 8, [1] * 16])
    config = CorruptionConfig(
        level="block", draw="monotone", t_min=0.2, t_max=0.7, at_least_one=False
    )
    for seed in range(20):
        both = draw(ids, ids > 0, jax.random.key(seed), config, block_size=4)
        weights = np.asarray(both.weights)[0]
        first, second = (1 / block[block > 0] for block in (weights[:4], weights[4:8]))
        if len(first) and len(second):
            assert first[0] <= second[0] <= first[0] + (0.7 - first[0]) / 3 + 1e-6


def test_floor_masks_no_block_whole_and_may_mask_none():
    """k = floor(4 t) of 4 tokens, weight 1 / t: a block is missing as often as t < 1/4."""
    config = CorruptionConfig(level="block", mask="floor", at_least_one=False)
    masked, weights = whole_rows(4096, 4, config)
    counts = masked.sum(axis=1)
    assert set(counts) == {0, 1, 2, 3}
    assert_mean((counts == 0).astype(float), (0.25 - 0.001) / 0.999, at_most=0.01)
    t = 1 / weights[masked]
    np.testing.assert_array_equal(np.floor(4 * t * (1 + 1e-6)), np.repeat(counts, counts))
