#!/usr/bin/env bash
# The wheel as a user has it, at the lowest and at the newest versions that pyproject.toml allows: installed into an empty
# environment and run from an empty folder. At the lowest, kernels are compiled for H200 and v5p too; at the tested ones
# `make check-all` and CI do that.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD home=$PWD/.cache/versions uv=$PWD/.venv/bin/uv
export JAX_PLATFORMS=cpu

say() { echo "versions: $*"; }

# check NAME RESOLUTION
check() {
    local bin=$home/$1/bin
    "$uv" venv --quiet --python "$root/.venv/bin/python" "$home/$1"
    # What the wheel asks for, and not what that asks for in turn, is taken at its lowest.
    "$uv" pip compile --quiet --python "$bin/python" --resolution "$2" --output-file "$home/$1.txt" pyproject.toml
    "$uv" pip install --quiet --python "$bin/python" --constraint "$home/$1.txt" "$home"/dist/*.whl
    mkdir "$home/$1-empty"
    cd "$home/$1-empty"
    say "$1: $("$bin/python" -c "import jax, sdar_jax; print(f'jax {jax.__version__}, sdar-jax {sdar_jax.__version__}')")"
    "$bin/python" -c "import sdar_jax; assert all(hasattr(sdar_jax, name) for name in sdar_jax.__all__)"
    "$bin/sdar-jax" doctor --json >doctor.json
    "$bin/python" -c "import json; problems = json.load(open('doctor.json'))['problems']; assert not problems, problems"
    "$bin/sdar-jax" train study2/8b_cpt --tiny
    "$bin/sdar-jax" sample --model runs/study2/8b_cpt-tiny/model --prompt the --max-new-tokens 12 --json
    cd "$root"
}

# The compilers come by the command that `sdar-jax doctor` prints, which so is known to work.
check_kernels() {
    local bin=$home/$1/bin install
    cd "$home/$1-empty"
    install=$("$bin/python" -c "import json; print(json.load(open('doctor.json'))['compilers']['install'])")
    say "$1: $install"
    eval "VIRTUAL_ENV=$home/$1 $uv $install --quiet"
    "$uv" pip install --quiet --python "$bin/python" beartype hypothesis pytest pytest-timeout
    cd "$root"
    COMPILERS=$home/$1-empty/.cache/compilers "$bin/python" -m pytest -q -m "" -p no:cacheprovider \
        tests/compile/test_mosaic_gpu.py::test_h200_in_ci tests/compile/test_mosaic_tpu.py::test_compiles_for_v5p \
        "tests/compile/test_paged.py::test_compiles[h200]" "tests/compile/test_paged.py::test_compiles[v5p]"
}

rm -rf "$home"
"$uv" build --quiet --out-dir "$home/dist" .
check lowest lowest-direct
check_kernels lowest
check newest highest
say "ready in $SECONDS s"
