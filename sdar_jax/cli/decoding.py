"""What commands that decode share: the flags of a `DecodingConfig`, the model, and how they end."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tyro

from sdar_jax import DecodingConfig, adapters, load_pretrained
from sdar_jax.cli.compilation import for_commands
from sdar_jax.cli.flags import Flags, warnings_in
from sdar_jax.decoding.commit_rules import StrategyName
from sdar_jax.devices.sharding import tensor_mesh
from sdar_jax.errors import DataError, SdarError
from sdar_jax.model import Model

INTERRUPTED = 130


@dataclasses.dataclass(frozen=True)
class DecodingFlags(DecodingConfig):
    __doc__ = DecodingConfig.__doc__
    # A command line has no functions.
    strategy: StrategyName | None = None


def load_model(
    directory: Path,
    *,
    dtype: str,
    block_size: int | None,
    mask_token_id: int | None,
    tensor: int,
    adapter: Path | None = None,
) -> Model:
    """Loads a model over so many devices, with an adapter merged in; an int8 base stays one."""
    model = load_pretrained(
        directory,
        dtype=dtype,
        block_size=block_size,
        mask_token_id=mask_token_id,
        mesh=tensor_mesh(tensor),
    )
    if adapter is None:
        return model
    adapted = adapters.load(model, adapter)
    return adapted if dtype == "int8" else adapters.merge(adapted)


def flags_of(*configs: Any) -> Flags:
    """The flags of all fields of some dataclasses."""
    fields = (field.name for config in configs for field in dataclasses.fields(config))
    return Flags({name: "--" + name.replace("_", "-") for name in fields})


def run_command[Config](
    kind: type[Config],
    run: Callable[[Config], int],
    arguments: Sequence[str] | None,
    program: str,
    *,
    description: str | None,
    flags: Flags,
    interrupted: str = "interrupted",
) -> int:
    """Parses a command line and runs it; errors and warnings are told in its own flags.

    Args:
        kind: a dataclass of what may be given.
        run: returns the exit status.
        interrupted: what is said when Ctrl-C comes.
    """
    try:
        config = tyro.cli(
            kind,
            prog=program,
            args=arguments,
            description=description,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
        with for_commands(), warnings_in(flags):
            return run(config)
    except SdarError as error:
        # What a line of a file has is in that file's words.
        told = str(error) if isinstance(error, DataError) else flags(str(error))
        print(f"error: {told}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(interrupted, file=sys.stderr)
        return INTERRUPTED
