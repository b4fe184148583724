"""Training: a config, a step, a loop, and checkpoints from which a run resumes by itself."""

from sdar_jax.evaluation.config import EvalConfig
from sdar_jax.training.config import CheckpointConfig, InitConfig, OptimizerConfig, TrainConfig
from sdar_jax.training.config_io import read_command_line, read_config
from sdar_jax.training.extensions import TrainingObjective
from sdar_jax.training.loop import Outcome, run, train
from sdar_jax.training.tiny import tiny

__all__ = [
    "CheckpointConfig",
    "EvalConfig",
    "InitConfig",
    "OptimizerConfig",
    "Outcome",
    "TrainConfig",
    "TrainingObjective",
    "read_command_line",
    "read_config",
    "run",
    "tiny",
    "train",
]
