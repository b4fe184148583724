"""The demo: train a small autoregressive model, convert it, decode with both, and compare. `python -m demo --help`.

Each stage is a recipe in configs/demo/, run as `python train.py` runs it; a stage that is finished is not run again.
"""

import dataclasses
import json
import logging
import sys
import time
from pathlib import Path

import tyro

from demo.evaluate import BASELINE, CONVERTED, evaluate, likelihoods, read_problems
from demo.report import forming, plot, table
from demo.tasks import build
from demo.tokenizer import make_tokenizer
from sdar_jax import load_pretrained
from sdar_jax.cli.compilation import for_commands
from sdar_jax.data.tokenizer import load_tokenizer
from sdar_jax.errors import SdarError, TrainingError
from sdar_jax.training import TrainConfig, read_config, run

CONFIGS = Path(__file__).parents[1] / "configs" / "demo"
TASKS = ("spiral_matrix", "rotate_matrix", "mini_sudoku")
PRETRAIN = "pretrain"
STAGES = (PRETRAIN, "ar_cpt", "ar_sft", "block4_cpt", "block4_sft", "block8_cpt", "block8_sft")
# What the recipes write; --out moves it.
HOME = Path("runs/demo")


@dataclasses.dataclass(frozen=True)
class DemoConfig:
    """Train a small autoregressive model on reasoning-gym tasks, convert it to block diffusion, and compare the two.

    Attributes:
        out: where everything is written.
        problems: held-out problems that every way of decoding answers.
        quick: a few steps and problems, to see that everything runs; its numbers mean nothing.
        seed: of the problems.
    """

    out: Path = HOME
    problems: int = 1000
    quick: bool = False
    seed: int = 0


def stage(name: str, out: Path, quick: bool) -> TrainConfig:
    """The recipe of a stage, with its paths under `out`."""
    config = read_config(CONFIGS / f"{name}.yaml")

    def moved(path: str | None) -> str | None:
        return None if path is None else str(out / Path(path).relative_to(HOME))

    sources = tuple(
        dataclasses.replace(source, path=moved(source.path)) for source in config.data.sources
    )
    model = dataclasses.replace(
        config.model,
        init_from=moved(config.model.init_from),
        tokenizer=moved(config.model.tokenizer),
    )
    changes = {"run_dir": moved(config.run_dir), "model": model}
    if quick:
        changes |= {"steps": 12, "optimizer": dataclasses.replace(config.optimizer, warmup=2)}
    return dataclasses.replace(
        config, data=dataclasses.replace(config.data, sources=sources), **changes
    )


def run_stages(out: Path, quick: bool) -> dict[str, int]:
    """Trains every stage that is not finished; returns the clean tokens that each one read."""
    tokens = {}
    for number, name in enumerate(STAGES, 1):
        print(
            f"\n[{number}/{len(STAGES)}] {name}: python train.py configs/demo/{name}.yaml",
            flush=True,
        )
        outcome = run(stage(name, out, quick))
        if not outcome.finished:
            raise TrainingError(
                f"stage {name} was interrupted at step {outcome.step}; run the demo again to go on"
            )
        tokens[name] = tokens_read(out / name)
    return tokens


def tokens_read(run_dir: Path) -> int:
    """The last line of a run's metrics says how many clean tokens it has read."""
    return json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[-1])["tokens"]


def main(config: DemoConfig) -> None:
    started = time.perf_counter()
    out = Path("runs/demo-quick") if config.quick and config.out == HOME else config.out
    count = 24 if config.quick else config.problems
    make_tokenizer(out / "tokenizer")
    build(TASKS, 2_000 if config.quick else 60_000, count, config.seed, out / "data")
    tokens = run_stages(out, config.quick)

    problems = read_problems(out / "data" / "test.jsonl")
    models = {name: load_pretrained(out / name / "model") for name in (BASELINE, *CONVERTED)}
    tokenizer = load_tokenizer(out / BASELINE / "model")
    print("\nHeld-out problems, the same for all:", flush=True)
    results = evaluate(models, tokenizer, problems)
    bounds = likelihoods(models, tokenizer, problems)

    print("\nAnswers forming, `·` not yet known, one line a forward:\n")
    for name in CONVERTED:
        print(forming(models[name], tokenizer, problems[:2]))
    shares = ", ".join(f"{name} {share(tokens, name):.2f}" for name in ("ar", "block4", "block8"))
    print(
        f"Tokens read: {tokens[PRETRAIN]:,} in pretraining; the later stages as a share of that: {shares}\n"
    )
    print(table(results))
    print("\nHeld-out answers, nats per token: " + "; ".join(bounds))
    plot(results, out / "accuracy.png")
    print(f"\nPicture: {out / 'accuracy.png'}. All in {time.perf_counter() - started:.0f} s.")


def share(tokens: dict[str, int], name: str) -> float:
    """CPT and SFT tokens of one model as a share of the pretraining's."""
    return (tokens[f"{name}_cpt"] + tokens[f"{name}_sft"]) / tokens[PRETRAIN]


if __name__ == "__main__":
    logging.basicConfig(format="%(message)s", force=True)
    logging.getLogger("sdar_jax").setLevel(logging.INFO)
    try:
        chosen = tyro.cli(DemoConfig, config=(tyro.conf.FlagCreatePairsOff,))
        with for_commands():
            main(chosen)
    except SdarError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
