"""Distillation: a frozen model's distributions are the targets of the one that is trained (D2F, arXiv 2508.09192).

    loss = sum_i w_i H(p_i, q_i) / N        p_i the teacher's distribution of token i, q_i the student's

The teacher is the model as training starts from it. Of the same masked tokens each of the two reads what its own
paradigm says: a teacher without blocks the whole row, its student what is up to the end of each block.
"""

import dataclasses
from typing import NamedTuple, get_args

import jax
from jaxtyping import Array, Int

from sdar_jax.errors import ConfigError
from sdar_jax.losses import SoftLoss, Teacher
from sdar_jax.model import Model
from sdar_jax.paradigm import Paradigm
from sdar_jax.visibility import Ranges


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """How a student is held to its teacher.

    Attributes:
        loss: "soft_cross_entropy", H(p, q), or "kl", which is that minus the teacher's entropy: another value, the
            same gradient.

    Raises:
        ConfigError: an unknown name.
    """

    loss: SoftLoss = "soft_cross_entropy"

    def __post_init__(self):
        if self.loss not in get_args(SoftLoss):
            raise ConfigError(
                f"distill loss {self.loss!r} is unknown; use one of {get_args(SoftLoss)}"
            )


class TeacherInputs(NamedTuple):
    """What the teacher reads. The first N of its T positions are the outputs, in the order of the student's.

    Attributes:
        tokens: int32 [B, T].
        positions: int32 [B, T], counted from each document's first token.
        ranges: what each of the T positions sees.
    """

    tokens: Int[Array, "B T"]
    positions: Int[Array, "B T"]
    ranges: Ranges


def teacher_outputs(model: Model, inputs: TeacherInputs, outputs: int, **options) -> Teacher:
    """Computes the teacher's hidden states [B, outputs, D] and its head, without a gradient.

    Args:
        model: the teacher.
        options: as of `Model.hidden_and_routing`.
    """
    # Planning finds its kernels by this name.
    with jax.named_scope("teacher"):
        hidden, _ = model.hidden_and_routing(*inputs, outputs=outputs, **options)
    return jax.lax.stop_gradient(Teacher(hidden, model.output_weights()))


def check_teacher(student: Paradigm, teacher: Paradigm, *, indexed: bool) -> None:
    """Raises ConfigError where two models cannot be asked for the distributions of the same tokens.

    Args:
        indexed: whether only some positions have noisy copies (`Batch.noisy_index`).
    """
    if not (student.masks and teacher.masks):
        raise ConfigError(
            "objective.distill is set and the model that training starts from fills no masks (it is autoregressive); "
            "start from a diffusion model, or leave it out"
        )
    if student.shifted != teacher.shifted:
        raise ConfigError(
            f"objective.distill is set, the model that training starts from has shifted={teacher.shifted} and the "
            f"trained one shifted={student.shifted}: their outputs are of different tokens; leave model.shifted out"
        )
    if indexed:
        raise ConfigError(
            "noisy_length is set and objective.distill, whose teacher may read every noisy token; leave "
            "noisy_length out"
        )


def check_noisy_context(paradigm: Paradigm, *, indexed: bool) -> None:
    """Raises ConfigError where blocks cannot see the noisy copy of what is before them.

    Args:
        indexed: whether only some positions have noisy copies (`Batch.noisy_index`).
    """
    if not paradigm.two_copies:
        raise ConfigError(
            "objective.noisy_context is True and the model has no blocks; leave it out"
        )
    if paradigm.causal_clean:
        raise ConfigError(
            "objective.noisy_context is True and causal_clean, which is of a clean copy that is not read; leave out one"
        )
    if indexed:
        raise ConfigError(
            "noisy_length is set and objective.noisy_context, which reads the noisy copy of every token; leave "
            "noisy_length out"
        )
