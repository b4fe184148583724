"""How fast a model decodes on this machine, against batch and block size: `sdar-jax profile --model DIR`.

    sdar-jax profile --model DIR --batches 1,2,4,8 --block-sizes 4,8 [--confidence-threshold 0.9] [--json]
    sdar-jax profile --model DIR --block-sizes 4 --strategy low_confidence_static --denoising-steps 2

A line for each: tokens a forward (TPF), wall time of a forward (t_f), tokens a second of the batch (TGS) with its
lowest and highest of the repeats, and of one row. Prompts are random, so TPF is that of noise; `sdar-jax evaluate` has
a task's. With --strategy low_confidence_static TPF is what was asked for, and the line is the paper's cost model
(Eq. 8-11) with everything in it measured.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Annotated

import tyro

from sdar_jax.cli.decoding import DecodingFlags, flags_of, load_model, run_command
from sdar_jax.cli.evaluate import numbers
from sdar_jax.devices.chips import check_backend
from sdar_jax.evaluation.profile import Speed, profile
from sdar_jax.hf.released import model_directory


@dataclasses.dataclass(frozen=True)
class ProfileConfig:
    """Measure how fast a model decodes here.

    Attributes:
        model: a Hugging Face directory, or a hub id.
        batches: comma-separated numbers of rows.
        block_sizes: comma-separated block sizes; the model's own if left out.
        prompt_length: tokens of each prompt.
        new_tokens: tokens of each answer.
        repeats: timed calls of each, behind one that compiles.
        dtype: of the weights: auto (bfloat16 on GPU and TPU, float32 on CPU), int8, or a name.
        mask_token_id: where the model's config.json has none.
        tensor: devices that share heads, feed-forward width and vocabulary; -1 is all that are here.
        json: print JSON.
        window_slots: K, blocks that one forward may read; with an add_threshold below 1, so many are filled at once.
        decoding: how to decode.
    """

    model: str
    batches: str = "1,2,4,8"
    block_sizes: str | None = None
    prompt_length: int = 64
    new_tokens: int = 64
    repeats: int = 3
    dtype: str = "auto"
    mask_token_id: int | None = None
    tensor: int = 1
    json: bool = False
    window_slots: int = 2
    decoding: Annotated[DecodingFlags, tyro.conf.arg(name="")] = DecodingFlags()


_FLAGS = flags_of(ProfileConfig, DecodingFlags)
_LINE = "{:>5} {:>6} {:>6} {:>9} {:>9} {:>19} {:>10}"


def main(arguments: Sequence[str] | None = None, program: str = "sdar-jax profile") -> int:
    """Measures; returns the exit status."""
    return run_command(ProfileConfig, _run, arguments, program, description=__doc__, flags=_FLAGS)


def _run(config: ProfileConfig) -> int:
    check_backend()
    batches = numbers("batches", config.batches, int)
    sizes = numbers("block_sizes", config.block_sizes, int)
    model = load_model(
        model_directory(config.model),
        dtype=config.dtype,
        block_size=sizes[0] if sizes else config.decoding.block_size,
        mask_token_id=config.mask_token_id,
        tensor=config.tensor,
    )
    if not config.json:
        print(_LINE.format("block", "batch", "TPF", "t_f, ms", "TGS", "lowest to highest", "a row"))
    found = []
    for speed in profile(
        model,
        config.decoding,
        batches=batches,
        block_sizes=sizes,
        prompt_length=config.prompt_length,
        new_tokens=config.new_tokens,
        repeats=config.repeats,
        window_slots=config.window_slots,
    ):
        found.append(dataclasses.asdict(speed))
        if not config.json:
            print(_line(speed), flush=True)
    if config.json:
        print(json.dumps(found, indent=1))
    return 0


def _line(speed: Speed) -> str:
    return _LINE.format(
        "AR" if speed.block_size is None else speed.block_size,
        speed.batch,
        f"{speed.tokens_per_forward:.2f}",
        f"{speed.forward_ms:.2f}",
        f"{speed.tokens_per_second:,.0f}",
        f"{speed.low:,.0f} to {speed.high:,.0f}",
        f"{speed.per_row:,.0f}",
    )


if __name__ == "__main__":
    sys.exit(main())
