"""Extensions of a run from Python, besides its config: data, evaluators, callbacks, an objective, frozen weights."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
from jaxtyping import Array

from sdar_jax.errors import ConfigError
from sdar_jax.loss_metrics import LossMetrics
from sdar_jax.model import Model
from sdar_jax.model.config import ModelConfig
from sdar_jax.objectives import Batch, LossInputs

Evaluator = Callable[[Model, int], dict[str, float]]
"""(model, step) -> named numbers."""
Callback = Callable[[int, dict[str, Any], Callable[[], Model]], None]
"""(step, line, model): called with each line of metrics.jsonl; `model()` is the model as it would be exported now."""


class TrainingObjective(NamedTuple):
    """An objective of one's own: two functions of JAX arrays, which are traced into the step.

    Attributes:
        make_inputs: (batch, key, model's config) -> the `LossInputs`: what the network reads and has to predict, and
            what each row adds to the normalizer. Called on the global batch of a step; the key differs from step to
            step. The inputs have the batch's rows in their order, or for each as many views, one after the other.
        loss: (model, inputs, *, remat, compute_dtype) -> the weighted sum, float32, and its metrics. Called on each
            micro-batch, and divided by the sum of `inputs.normalizer`. With `config.objective.distill` it is also given
            the frozen model, as `teacher`. None: weighted cross-entropy, with an MoE's router losses.
    """

    make_inputs: Callable[[Batch, jax.Array, ModelConfig], LossInputs]
    loss: Callable[..., tuple[Array, LossMetrics]] | None = None

    @property
    def name(self) -> str:
        """Names it in checkpoints."""
        functions = (self.make_inputs, self.loss)
        return ", ".join(
            getattr(each, "__qualname__", type(each).__qualname__) for each in functions if each
        )


class Extensions(NamedTuple):
    """The arguments of `train` behind the config."""

    data: Iterable[dict[str, Any]] | None = None
    evaluators: Sequence[Evaluator] = ()
    callbacks: Sequence[Callback] = ()
    objective: TrainingObjective | None = None
    trainable: Callable[[str], bool] | None = None

    def split(self, weights: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Splits weights (or their shapes) by name into those that are trained and those that are frozen.

        Raises:
            ConfigError: none is trained.
        """
        if self.trainable is None:
            return weights, {}
        trained = {name: weight for name, weight in weights.items() if self.trainable(name)}
        if not trained:
            raise ConfigError(
                f"trainable chooses none of the weights; their names are {', '.join(weights)}"
            )
        return trained, {name: weight for name, weight in weights.items() if name not in trained}
