# Every target makes .venv when it is missing, and renews it when pyproject.toml or constraints.txt changed.
# PYTHON=/path/to/python chooses the interpreter; EXTRAS=dev,cuda12 (or dev,tpu) installs for an accelerator.
EXTRAS ?= dev
DEMO_ARGS ?=
PYTEST_ARGS ?=
STAMP := .venv/.installed-$(EXTRAS)
# Tests need no accelerator and must not depend on one.
PYTEST := JAX_PLATFORMS=cpu .venv/bin/python -m pytest -q -n 2 --dist worksteal

.PHONY: demo demo-quick test check-all lint env clean

demo: $(STAMP)
	@.venv/bin/python -m demo $(DEMO_ARGS)

demo-quick: $(STAMP)
	@.venv/bin/python -m demo --quick $(DEMO_ARGS)

test: $(STAMP)
	@$(PYTEST) $(PYTEST_ARGS)

check-all: lint
	@HYPOTHESIS_PROFILE=thorough $(PYTEST) -m "" $(PYTEST_ARGS)

lint: $(STAMP)
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/pyright

env: $(STAMP)
	@:

$(STAMP): pyproject.toml constraints.txt
	@scripts/setup_env.sh $(EXTRAS)
	@touch $@

clean:
	rm -rf .venv .cache .pytest_cache .hypothesis .ruff_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
