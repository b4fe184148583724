"""Trains a model as a recipe or a YAML file says: `sdar-jax train` in a checkout. `python train.py --help`."""

import sys

from sdar_jax.cli.train import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], program="train.py"))
