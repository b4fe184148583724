"""What a loss tells besides its value, and what it has to know of a whole step."""

from typing import NamedTuple

from jaxtyping import Array, Float, Int


class RouterMetrics(NamedTuple):
    """An MoE's balance loss, z-loss and `max_load`, each times the sum of `LossInputs.normalizer`. Float32 scalars."""

    balance: Float[Array, ""]
    z: Float[Array, ""]
    max_load: Float[Array, ""]


class LossMetrics(NamedTuple):
    """Sums over the tokens with loss. Float32 scalars.

    Attributes:
        nll: cross-entropy in nats, unweighted.
        correct: how many first guesses are right.
        num_loss_tokens: how many tokens have a weight.
        router: None for dense models, and from `weighted_loss`.
        entropy: in nats, of the distributions where the first guess is right; None without `confidence_beta`.
    """

    nll: Float[Array, ""]
    correct: Float[Array, ""]
    num_loss_tokens: Float[Array, ""]
    router: RouterMetrics | None = None
    entropy: Float[Array, ""] | None = None


class StepTotals(NamedTuple):
    """What a loss with `confidence_beta` has to know of all micro-batches of a step. Scalars, without gradients.

    Attributes:
        normalizer: the sum of `LossInputs.normalizer`.
        num_correct: how many tokens with a weight have a right first guess (`count_correct`).
    """

    normalizer: Float[Array, ""]
    num_correct: Int[Array, ""]
