"""Losses of tiny D2F runs by mesh, in full and by LoRA: `python -m tests.training.distill_on_mesh HOME`."""

import json
import logging
import sys
from dataclasses import replace
from pathlib import Path

from sdar_jax.adapters import LoraConfig
from sdar_jax.data import DataConfig
from sdar_jax.devices.sharding import MeshConfig
from sdar_jax.distillation import DistillConfig
from sdar_jax.objectives import ObjectiveConfig
from sdar_jax.training import InitConfig, TrainConfig, read_config, run, tiny

RECIPE = "configs/lora/8b_sft.yaml"
D2F = ObjectiveConfig(normalizer="masked", distill=DistillConfig(), noisy_context=True)


def d2f(config: TrainConfig, start: str, lora: LoraConfig | None) -> TrainConfig:
    """The recipe's run, from a canvas, without choosing noisy copies."""
    model = InitConfig(
        init_from=start,
        objective="block_diffusion",
        block_size=4,
        block_origin="response",
        bidirectional_prompt=True,
    )
    data: DataConfig = replace(config.data, noisy_length=None)
    return replace(config, model=model, data=data, objective=D2F, lora=lora, steps=4)


def losses(config: TrainConfig, run_dir: Path) -> list[float]:
    changed = replace(config, run_dir=str(run_dir), compute_dtype="float32")
    assert run(changed).finished
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


if __name__ == "__main__":
    logging.disable()
    home = Path(sys.argv[1])
    mesh = MeshConfig(fsdp=2, tensor=2, context=2)
    recipe = replace(read_config(RECIPE), mesh=mesh, lora=None, run_dir=str(home / "start"))
    # A run makes the canvas to start from: of no step that matters, and its data and tokenizer.
    small = tiny(replace(recipe, model=replace(recipe.model, objective="masked_diffusion")))
    small = replace(small, eval=None, data=replace(small.data, noisy_length=None))
    assert run(replace(small, steps=1)).finished
    start = str(Path(small.run_dir) / "model")
    found = {}
    for kind, lora in {"full": None, "lora": LoraConfig(r=4)}.items():
        config = d2f(small, start, lora)
        for name, each in {"split": mesh, "rows": MeshConfig(data=8, fsdp=1)}.items():
            rows = replace(config.data, batch_size=8)
            changed = replace(config, mesh=each, data=rows, micro_batch_size=None)
            found[f"{kind} {name}"] = losses(changed, home / kind / name)
    print(json.dumps(found))
