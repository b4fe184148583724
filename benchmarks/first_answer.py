"""Seconds to a first answer on this CPU, compilation and all, and of later ones; beside another tree, if one is given.

    python -m benchmarks.first_answer [--beside DIR] [--layers 28] [--width 64] [--rounds 3]

Each measurement is a process of its own, with no compilation cache; those of the trees take turns. `DIR` is another
checkout, say an older commit's (`git worktree add DIR COMMIT`), whose `sdar_jax` the same script imports. Making random
weights is not counted. CPU seconds are of all threads of the process: they hardly depend on what else the machine does.

    generate    one prompt of 5 tokens, 32 new ones
    engine      8 such requests in 8 slots
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
WHAT = ("generate", "engine")
LATER = 10


def measure(what: str, layers: int, width: int) -> dict[str, float]:
    """In this process: CPU and wall seconds of the first call, and the median wall seconds of later ones."""
    import jax

    from sdar_jax import Engine, ModelConfig, generate
    from sdar_jax.model import Model

    network = {"hidden_size": width, "num_layers": layers, "intermediate_size": 2 * width}
    heads = {"num_heads": 4, "num_kv_heads": 2, "head_dim": max(16, width // 4)}
    purpose = {"objective": "block_diffusion", "block_size": 4, "mask_token_id": 999}
    config = ModelConfig(vocab_size=1000, **network, **heads, **purpose)
    model = jax.block_until_ready(Model(config, jax.random.key(0)))
    prompts = [[1, 2, 3, 4, 5]]
    if what == "engine":
        engine = Engine(model, batch_slots=8, max_length=256)
        call = lambda: engine.generate(prompts * 8, max_new_tokens=32)
    else:
        call = lambda: generate(model, prompts, max_new_tokens=32)

    def timed() -> tuple[float, float]:
        cpu, wall = _cpu_seconds(), time.perf_counter()
        call()
        return _cpu_seconds() - cpu, time.perf_counter() - wall

    first = timed()
    later = statistics.median(timed()[1] for _ in range(LATER))
    return {"cpu": first[0], "wall": first[1], "later": later}


def _cpu_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def _in_process(tree: Path, what: str, layers: int, width: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", what, "--layers", str(layers)]
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("JAX_COMP")},
        "PYTHONPATH": str(tree),
        "JAX_PLATFORMS": "cpu",
    }
    run = subprocess.run(
        [*command, "--width", str(width)],
        cwd=tree,
        env=environment,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return json.loads(run.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--beside", type=Path)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", choices=WHAT, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.layers, options.width)))
        return
    trees = {"this tree": ROOT} | ({"beside": options.beside.resolve()} if options.beside else {})
    print(
        f"{options.layers} layers of width {options.width}; medians of {options.rounds} processes"
    )
    for what in WHAT:
        found: dict[str, list[dict[str, float]]] = {name: [] for name in trees}
        for _ in range(options.rounds):
            for name, tree in trees.items():
                found[name].append(_in_process(tree, what, options.layers, options.width))
        for name, runs in found.items():
            cpu, wall, later = (
                statistics.median(run[key] for run in runs) for key in ("cpu", "wall", "later")
            )
            print(
                f"{what:<9} {name:<10} first {cpu:6.1f} CPU s, {wall:6.1f} s;  later {1e3 * later:7.1f} ms"
            )


if __name__ == "__main__":
    main()
