"""Decodes with a model: `sdar-jax sample` in a checkout. `python sample.py --help`."""

import sys

from sdar_jax.cli.sample import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], program="python sample.py"))
