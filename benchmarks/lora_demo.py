"""LoRA beside full fine-tuning on the demo's tasks: the last stage of its blocks of 4, in one run.

    python -m benchmarks.lora_demo [--ranks 8 32] [--learning-rate 0.01] [--problems 1000]

Wants what `make demo` leaves in runs/demo. Full fine-tuning and LoRA of each rank on all projections start from the
same weights and read the same batches; only the learning rate differs, as low-rank matrices want a higher one.
Held-out problems are decoded dynamically at 0.9 and scored by the tasks' own verifiers.
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

import sdar_jax
from demo.evaluate import BATCH, MAX_NEW_TOKENS, read_problems
from demo.tasks import score
from sdar_jax import DecodingConfig, generate
from sdar_jax.adapters import LoraConfig
from sdar_jax.model import Model
from sdar_jax.training import TrainConfig, read_config

DEMO = Path("runs/demo")
RECIPE = "configs/demo/block4_sft.yaml"


def configs(ranks: Sequence[int], learning_rate: float, folder: Path) -> dict[str, TrainConfig]:
    """Makes the runs, by name."""
    full = replace(read_config(RECIPE), run_dir=str(folder / "full"))
    higher = replace(full.optimizer, learning_rate=learning_rate)
    of_rank = {
        f"LoRA, r = {rank}": replace(
            full,
            run_dir=str(folder / f"r{rank}"),
            lora=LoraConfig(r=rank, lora_alpha=2 * rank),
            optimizer=higher,
        )
        for rank in ranks
    }
    return {"full": full, **of_rank}


def accuracy(model: Model, problems: list[dict]) -> tuple[float, float]:
    """Decodes the problems; the part that is right, and its standard error."""
    tokenizer = sdar_jax.load_tokenizer(DEMO / "tokenizer")
    texts = []
    for first in range(0, len(problems), BATCH):
        prompts = [problem["prompt"] for problem in problems[first : first + BATCH]]
        config = DecodingConfig(confidence_threshold=0.9)
        done = generate(model, prompts, config, max_new_tokens=MAX_NEW_TOKENS, tokenizer=tokenizer)
        texts += [each.text or "" for each in done]
    right = np.array(score(problems, texts)) == 1.0
    return float(right.mean()), float(right.std(ddof=1) / np.sqrt(len(right)))


def learned(config: TrainConfig) -> int:
    """Counts the numbers that a run learned, by the float32 files that it wrote."""
    of = "model" if config.lora is None else "adapter"
    return sum(file.stat().st_size for file in Path(config.run_dir, of).glob("*.safetensors")) // 4


def main() -> None:
    """Trains, decodes, and prints a line for each run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", nargs="+", type=int, default=[8, 32])
    parser.add_argument("--learning-rate", type=float, default=0.01, help="of LoRA")
    parser.add_argument("--problems", type=int, default=1000)
    args = parser.parse_args()
    problems = read_problems(DEMO / "data" / "test.jsonl")[: args.problems]
    with tempfile.TemporaryDirectory() as folder:
        for name, config in configs(args.ranks, args.learning_rate, Path(folder)).items():
            started = time.perf_counter()
            model = sdar_jax.train(config)
            seconds = time.perf_counter() - started
            mean, error = accuracy(model, problems)
            numbers = f"about {learned(config):,} numbers learned, {seconds:.0f} s"
            print(f"{name}: {numbers}, accuracy {mean:.3f} ± {error:.3f}", flush=True)


if __name__ == "__main__":
    main()
