"""Scores held-out data as an evaluator, which `train` calls now and then."""

import itertools
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from sdar_jax.errors import DataError
from sdar_jax.evaluation.config import EvalConfig
from sdar_jax.evaluation.likelihood import autoregressive_nll, nelbo
from sdar_jax.model import Model
from sdar_jax.objectives import Batch, predicted

Rows = dict[str, np.ndarray]


def held_out_likelihood(
    config: EvalConfig, data: Iterator[Rows]
) -> Callable[[Model, int], dict[str, float]]:
    """Makes an evaluator: held-out likelihood in nats per token over the first `config.rows` rows, batch by batch.

    The evaluator returns {"nll": ...} of a model that predicts each next token, else {"nelbo": ..., "nelbo_se": ...}.

    Args:
        data: batches of `config.data.batch_size` rows, as a PackedDataset gives them; the rows are read now.

    Raises:
        DataError: no token of these rows counts.
    """
    assert config.data is not None
    batches = list(itertools.islice(data, math.ceil(config.rows / config.data.batch_size)))
    if not any(batch["loss_mask"].any() for batch in batches):
        raise DataError(
            "eval.data has no token that counts in its first rows; give other data, or more eval.rows"
        )

    def evaluate(model: Model, step: int) -> dict[str, float]:
        scores = np.array(list(_scores(model, batches, config)))
        shares = scores[:, 0] / scores[:, 0].sum()
        mean = shares @ scores[:, 1]
        error = float(np.linalg.norm(shares * scores[:, 2]))
        if not model.config.paradigm.masks:
            return {"nll": float(mean)}
        return {"nelbo": float(mean), "nelbo_se": error}

    return evaluate


def _scores(
    model: Model, batches: list[Rows], config: EvalConfig
) -> Iterator[tuple[float, float, float]]:
    """Yields (tokens counted, nats per token, standard error) of each batch that has tokens to count."""
    paradigm = model.config.paradigm
    for i, batch in enumerate(batches):
        tokens = batch["tokens"]
        masks = {name: batch[name] for name in ("segment_ids", "loss_mask")}
        on_device = Batch(jnp.asarray(tokens), **jax.tree.map(jnp.asarray, masks))
        counted = float(predicted(paradigm, on_device).sum())
        if not counted:
            continue
        if paradigm.masks:
            seed = config.seed + i
            bound = nelbo(
                model,
                tokens,
                block_size=paradigm.block_size,
                samples=config.samples,
                seed=seed,
                **masks,
            )
            yield counted, *bound
        else:
            yield counted, autoregressive_nll(model, tokens, **masks), 0.0
