"""Checks that a config, its model and its mesh go together, before anything is read or compiled."""

import logging

from jax.sharding import Mesh

from sdar_jax.errors import ConfigError
from sdar_jax.model.axes import check_mesh
from sdar_jax.model.config import ModelConfig
from sdar_jax.model.conversion import with_purpose
from sdar_jax.objectives import check_reading
from sdar_jax.paradigm import NEXT_TOKEN, Paradigm, fills_masks
from sdar_jax.training.config import InitConfig, TrainConfig

log = logging.getLogger(__name__)


def check_run(
    config: TrainConfig, model: ModelConfig, mesh: Mesh, teacher: Paradigm | None = None
) -> None:
    """Raises ConfigError where `mesh` does not divide what a step of this run computes, or noisy_length is no use.

    Args:
        model: the one that training starts from, converted or not.
        teacher: how the teacher reads, if there is one.
    """
    length = config.data.sequence_length
    paradigm = trained_paradigm(config.layout_model, model)
    if config.block_sizes and not paradigm.two_copies:
        raise ConfigError(
            f"block_sizes is {[list(pair) for pair in config.block_sizes]} and the model has no blocks; leave it out"
        )
    indexed = config.data.noisy_length is not None
    check_reading(config.objective, paradigm, teacher, indexed=indexed)
    beta = config.objective.confidence_beta
    if beta and not paradigm.masks:
        raise ConfigError(
            f"objective.confidence_beta is {beta} and the model autoregressive, which fills no masks; leave it out"
        )
    if config.noise_ramp.moves and not paradigm.masks:
        raise ConfigError(
            "noise_ramp is given and the model autoregressive, which fills no masks; leave it out"
        )
    _check_order(config, paradigm)
    if config.eval is not None and "position" in config.eval.by and not paradigm.two_copies:
        raise ConfigError("eval.by has position and the model has no blocks; leave it out")
    noisy = config.data.noisy_length or length
    both_copies = (noisy + length, noisy)
    student_reads_both = paradigm.two_copies and not config.objective.noisy_context
    lengths = both_copies if student_reads_both else (length,)
    if teacher is not None:
        lengths += both_copies if teacher.two_copies else (length,)
    check_mesh(
        mesh, model, batch_size=config.micro_batch_size or config.data.batch_size, lengths=lengths
    )


def _check_order(config: TrainConfig, paradigm: Paradigm) -> None:
    """Raises ConfigError where masks follow an order that some of the data does not have."""
    if config.objective.corruption.mask != "trajectory" or not paradigm.masks:
        return
    for source in config.data.sources:
        if source.format != "trajectory":
            raise ConfigError(
                f"objective.corruption.mask is trajectory and {source.path} of format {source.format}, which has no "
                "order; give sources of format trajectory alone, or another mask"
            )


def check_phases_reached(config: TrainConfig) -> None:
    """Raises ConfigError where a run would end before the last of its `block_sizes`."""
    for start, size in config.block_size_phases:
        if start >= config.total_steps:
            raise ConfigError(
                f"block_sizes has {size} after {start} steps and the run has {config.total_steps}; start it earlier, "
                "or leave it out"
            )


def trained_paradigm(config: InitConfig, model: ModelConfig) -> Paradigm:
    """Returns the paradigm of the model which this one becomes. Raises ConfigError as `to_diffusion`."""
    objective = config.objective or model.objective
    if not fills_masks(objective):
        return NEXT_TOKEN
    return with_purpose(model, objective, **config.paradigm_values).paradigm


def check_context(config: TrainConfig, model: ModelConfig) -> None:
    """Refuses rows longer than the model's context where a row is one sequence, and warns where documents may be
    short."""
    for name, data in (
        ("data", config.data),
        ("eval.data", config.eval.data if config.eval else None),
    ):
        if data is None or data.sequence_length <= model.max_position_embeddings:
            continue
        problem = (
            f"{name}.sequence_length is {data.sequence_length} and the model's max_position_embeddings "
            f"{model.max_position_embeddings}"
        )
        fix = f"lower it to {model.max_position_embeddings}, or raise max_position_embeddings in the model's config"
        if data.segments == "row":
            raise ConfigError(f"{problem}: {fix}")
        log.warning(
            "%s: longer documents are learned at positions where it cannot be decoded; %s",
            problem,
            fix,
        )
