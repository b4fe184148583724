"""A recipe's tiny run over the devices of this process: `python -m tests.recipes.on_mesh RECIPE HOME`."""

import json
import logging
import sys
from dataclasses import replace
from pathlib import Path

from sdar_jax.training import read_config, run, tiny

if __name__ == "__main__":
    logging.disable()
    recipe, home = sys.argv[1:]
    config = read_config(f"configs/{recipe}.yaml")
    small = tiny(replace(config, run_dir=str(Path(home) / "run")))
    assert run(small).finished and (Path(small.run_dir) / "model" / "config.json").exists()
    print(json.dumps(vars(small.mesh)))
