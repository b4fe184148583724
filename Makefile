# Every target makes .venv when it is missing, and renews it when pyproject.toml or constraints.txt changed.
# PYTHON=/path/to/python chooses the interpreter; EXTRAS=dev,cuda12 (or dev,tpu) installs for an accelerator.
EXTRAS ?= dev
DEMO_ARGS ?=
PYTEST_ARGS ?=
STAMP := .venv/.installed-$(EXTRAS)
# Tests need no accelerator and must not depend on one.
PYTEST := JAX_PLATFORMS=cpu .venv/bin/python -m pytest -q -n 2 --dist worksteal

# The compilers for TPU and NVIDIA, for chips that are not here: beside the environment, so that nothing else sees them.
COMPILERS := .cache/compilers

.PHONY: demo demo-quick test check-all check-versions lint env compilers clean

demo: $(STAMP)
	@.venv/bin/python -m demo $(DEMO_ARGS)

demo-quick: $(STAMP)
	@.venv/bin/python -m demo --quick $(DEMO_ARGS)

test: $(STAMP)
	@$(PYTEST) $(PYTEST_ARGS)

check-all: lint compilers
	@HYPOTHESIS_PROFILE=thorough $(PYTEST) -m "" $(PYTEST_ARGS)

check-versions: $(STAMP)
	@scripts/check_versions.sh

lint: $(STAMP)
	@.venv/bin/ruff check .
	@.venv/bin/ruff format --check .
	@.venv/bin/pyright

env: $(STAMP)
	@:

compilers: $(COMPILERS)/.installed

$(COMPILERS)/.installed: compilers.txt | $(STAMP)
	@rm -rf $(COMPILERS)
	@.venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --target $(COMPILERS) -r compilers.txt
	@touch $@

$(STAMP): pyproject.toml constraints.txt
	@scripts/setup_env.sh $(EXTRAS)
	@touch $@

clean:
	rm -rf .venv .cache .pytest_cache .hypothesis .ruff_cache build *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
