"""Several blocks at once on small models: accuracy, tokens per forward and tokens a second, with what training adds.

    python -m benchmarks.multiblock [--seeds 0 1 2] [--problems 300] [--block-sizes 4 16] [--out runs/multiblock_demo]
        [--add 0.1] [--activate 0.25 0.9] [--taus 0.9] [--stages single multitf multitf_cap d2f]

A chain of recipes (configs/multiblock_demo) is trained: an autoregressive model from scratch, once, and for each seed
more of the same as the baseline, its conversion to single blocks, and from that MultiTF, MultiTF with CAP, and D2F's
distillation. A stage that is finished is not run again. Then each is decoded on the same held-out problems, whose
answers have 64 characters (demo/long_tasks.py), in batches and one at a time. Printed are means over seeds with their
standard errors, and for each task its accuracy and tokens a forward. Several values of a threshold are all tried.
"""

import argparse
import dataclasses
import itertools
import json
import logging
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from demo.long_tasks import TASKS, build, is_right
from demo.tokenizer import make_tokenizer
from sdar_jax import Completion, DecodingConfig, generate, load_pretrained, load_tokenizer
from sdar_jax.errors import TrainingError
from sdar_jax.model import Model
from sdar_jax.training import TrainConfig, read_config, run

CONFIGS = Path("configs/multiblock_demo")
HOME = Path("runs/multiblock_demo")  # What the recipes write; --out moves it.
STAGES = ("single", "multitf", "multitf_cap", "d2f")
SLOTS = 4
BATCH = 50
NEW_TOKENS = 72
# (tau_add, tau_act) by block size, as published for MultiBD on SDAR's blocks of 4 and of 32 (arXiv 2606.29215).
THRESHOLDS = {4: (0.10, 0.25), 16: (0.10, 0.90)}


class Way(NamedTuple):
    """A model of the chain, and how it is decoded."""

    name: str
    stage: str
    config: DecodingConfig
    slots: int = 2


def ways(taus: Sequence[float], adds: Sequence[float], activates: Sequence[float]) -> Iterator[Way]:
    """What is compared at a block size."""
    for tau in taus:
        single = DecodingConfig(confidence_threshold=tau)
        yield Way("single block", "single", single)
        for add, activate in itertools.product(adds, activates):
            yield from _several(
                dataclasses.replace(single, add_threshold=add, activate_threshold=activate)
            )


def _several(several: DecodingConfig) -> list[Way]:
    return [
        Way("multi-block, training-free", "single", several, SLOTS),
        Way("MultiTF", "multitf", several, SLOTS),
        Way("MultiTF + CAP", "multitf_cap", several, SLOTS),
        Way("D2F-distilled", "d2f", several, SLOTS),
    ]


def folder(stage: str, block_size: int | None) -> str:
    """The folder of a stage's run, among those of its seed."""
    return f"block{block_size}_{stage}" if stage in STAGES else stage


def stage(name: str, block_size: int | None, seed: int, out: Path, quick: bool) -> TrainConfig:
    """The recipe of a stage with its paths, block size and seeds replaced."""
    config = read_config(CONFIGS / f"{name}.yaml")
    shared = {"tokenizer", "data", "pretrain"}

    def moved(path: str | None) -> str | None:
        if path is None:
            return None
        first, *rest = Path(path).relative_to(HOME).parts
        if first in shared:
            return str(out / Path(first, *rest))
        return str(out / f"seed{seed}" / folder(first, block_size) / Path(*rest))

    model = dataclasses.replace(
        config.model,
        init_from=moved(config.model.init_from),
        tokenizer=moved(config.model.tokenizer),
        block_size=block_size if config.model.block_size else None,
    )
    sources = tuple(
        dataclasses.replace(source, path=moved(source.path)) for source in config.data.sources
    )
    data = dataclasses.replace(config.data, sources=sources, seed=config.data.seed + 100 * seed)
    changes: dict[str, Any] = {"seed": seed, "run_dir": moved(config.run_dir)}
    if quick:
        changes |= {"steps": 12, "optimizer": dataclasses.replace(config.optimizer, warmup=2)}
    return dataclasses.replace(config, model=model, data=data, **changes)


def train_chain(
    seed: int, sizes: Sequence[int], stages: Sequence[str], out: Path, quick: bool
) -> None:
    """Trains what of a seed's chain is not there yet; the first stage is that of seed 0 for all."""
    todo: list[tuple[str, int | None, int]] = [("pretrain", None, 0), ("ar", None, seed)]
    todo += [(name, size, seed) for size in sizes for name in stages]
    for name, size, of_seed in todo:
        started = time.perf_counter()
        outcome = run(stage(name, size, of_seed, out, quick))
        if not outcome.finished:
            raise TrainingError(
                f"stage {name} was interrupted at step {outcome.step}; run it again"
            )
        seconds = time.perf_counter() - started
        print(f"seed {seed}: {name}, S = {size or '-'}, {seconds:.0f} s", flush=True)


def measured(
    way: Way, model: Model, problems: Sequence[dict[str, Any]], tokenizer: Any, alone: int
) -> dict[str, Any]:
    """Accuracy, in all and by task, tokens per forward, and tokens a second of one request at a time."""
    options: dict[str, Any] = {"max_new_tokens": NEW_TOKENS, "tokenizer": tokenizer}
    options["window_slots"] = way.slots
    prompts = [problem["prompt"] for problem in problems]
    done = []
    for first in range(0, len(prompts), BATCH):
        done += generate(model, prompts[first : first + BATCH], way.config, **options)
    right = [is_right(each, one.text or "") for each, one in zip(problems, done, strict=True)]
    by_task: dict[str, list[bool]] = {}
    done_by_task: dict[str, list[Completion]] = {}
    for problem, good, one in zip(problems, right, done, strict=True):
        by_task.setdefault(problem["task"], []).append(good)
        done_by_task.setdefault(problem["task"], []).append(one)
    tokens, seconds = 0, 0.0
    for i, prompt in enumerate([prompts[0], *prompts[:alone]]):
        started = time.perf_counter()
        (one,) = generate(model, [prompt], way.config, **options)
        if i:  # The first compiles.
            seconds += time.perf_counter() - started
            tokens += len(one.tokens)
    return {
        "accuracy": statistics.mean(right),
        "tpf": _tpf(done),
        "tokens_per_second": tokens / seconds,
        **{task: statistics.mean(good) for task, good in by_task.items()},
        **{f"{task}_tpf": _tpf(found) for task, found in done_by_task.items()},
    }


def _tpf(done: Sequence[Completion]) -> float:
    return sum(len(one.tokens) for one in done) / sum(one.denoising_forwards for one in done)


def rows_of(seed: int, problems: list[dict], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Decodes all of a seed's models, each with its own ways."""
    tokenizer = load_tokenizer(args.out / "tokenizer")
    todo: list[tuple[int | None, Way]] = [(None, Way("AR", "ar", DecodingConfig()))]
    for size in args.block_sizes:
        add, activate = THRESHOLDS[size]
        thresholds = args.add or [add], args.activate or [activate]
        todo += [(size, way) for way in ways(args.taus, *thresholds) if way.stage in args.stages]
    for size, way in todo:
        model = load_pretrained(args.out / f"seed{seed}" / folder(way.stage, size) / "model")
        found = measured(way, model, problems, tokenizer, args.alone)
        row = {
            "seed": seed,
            "block_size": size,
            "way": way.name,
            "thresholds": _shown(way),
            **found,
        }
        print(json.dumps(row), flush=True)
        yield row


def _shown(way: Way) -> str:
    config = way.config
    tau = f"{config.confidence_threshold:g}"
    if way.slots == SLOTS:
        return f"{config.add_threshold:g}, {config.activate_threshold:g}, {tau}"
    return "-" if way.stage == "ar" else tau


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Means over seeds with standard errors, a line a way."""
    head = ("S", "way", "add, act, conf", "accuracy", "TPF", "tokens/s alone", *TASKS)
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["block_size"], row["way"], row["thresholds"]), []).append(row)
    for (size, way, thresholds), of_seeds in groups.items():
        of = lambda name, rows=of_seeds: [row[name] for row in rows]
        cells = [shown(name, of(name)) for name in ("accuracy", "tpf", "tokens_per_second")]
        for task in TASKS:
            mean = statistics.mean(of(f"{task}_tpf"))
            cells.append(f"{statistics.mean(of(task)):.2f} at {mean:.2f}")
        lines.append(f"| {size or '-'} | {way} | {thresholds} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def shown(name: str, values: Sequence[float]) -> str:
    """A mean over seeds, and its standard error where there are several."""
    digits = {"tokens_per_second": 0, "tpf": 2}.get(name, 3)
    error = (
        f" ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}" if len(values) > 1 else ""
    )
    return f"{statistics.mean(values):.{digits}f}{error}"


def main() -> None:
    """Trains, decodes, and prints the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--problems", type=int, default=300)
    parser.add_argument("--alone", type=int, default=40, help="problems decoded one at a time")
    parser.add_argument("--block-sizes", nargs="+", type=int, default=[4, 16], choices=THRESHOLDS)
    parser.add_argument("--taus", nargs="+", type=float, default=[0.9], help="tau_conf")
    parser.add_argument("--add", nargs="+", type=float, help="tau_add; the published if left out")
    parser.add_argument("--activate", nargs="+", type=float, help="tau_act; likewise")
    parser.add_argument("--stages", nargs="+", default=STAGES, choices=STAGES, help="not all")
    parser.add_argument("--out", type=Path, default=HOME)
    parser.add_argument("--quick", action="store_true", help="a few steps, to see that it runs")
    args = parser.parse_args()
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    make_tokenizer(args.out / "tokenizer")
    build(tuple(TASKS), 600 if args.quick else 60_000, 0, args.out / "data" / "train.jsonl")
    problems = build(tuple(TASKS), args.problems, 1, args.out / "data" / "test.jsonl")
    rows = []
    for seed in args.seeds:
        train_chain(seed, args.block_sizes, args.stages, args.out, args.quick)
        rows += rows_of(seed, problems, args)
        (args.out / "results.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
