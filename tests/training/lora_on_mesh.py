"""Losses of tiny LoRA runs, by mesh and by dtype of the base: `python -m tests.training.lora_on_mesh HOME`."""

import json
import logging
import sys
from dataclasses import replace
from pathlib import Path

from sdar_jax.adapters import LoraConfig
from sdar_jax.devices.sharding import MeshConfig
from sdar_jax.training import TrainConfig, read_config, run, tiny

RECIPE = "configs/lora/8b_sft.yaml"
EXPERTS = "configs/study2/30b-a3b_sft.yaml"


def losses(config: TrainConfig, run_dir: Path) -> list[float]:
    small = tiny(replace(config, run_dir=str(run_dir), compute_dtype="float32"))
    assert run(small).finished and (Path(small.run_dir) / "adapter").is_dir()
    lines = (Path(small.run_dir) / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


if __name__ == "__main__":
    logging.disable()
    home = Path(sys.argv[1])
    config = read_config(RECIPE)
    # As many parts of the rows: `tiny` has two rows for each.
    meshes = {"split": MeshConfig(fsdp=4, tensor=2), "rows": MeshConfig(data=4, fsdp=1, tensor=2)}
    found = {}
    for base in ("float32", "int8"):
        for name, mesh in meshes.items():
            changed = replace(config, mesh=mesh, lora=replace(config.lora, base_dtype=base))
            found[f"{base} {name}"] = losses(changed, home / base / name)
    moe = replace(read_config(EXPERTS), lora=LoraConfig(r=4))
    meshes = {
        "split": MeshConfig(fsdp=1, expert=4, tensor=2),
        "rows": MeshConfig(data=4, fsdp=1, tensor=2),
    }
    for name, mesh in meshes.items():
        found[f"experts {name}"] = losses(replace(moe, mesh=mesh), home / "experts" / name)
    print(json.dumps(found))
