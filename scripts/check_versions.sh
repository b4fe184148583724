#!/usr/bin/env bash
# The wheel as a user has it, at the lowest and at the newest versions that pyproject.toml allows: installed into an
# empty environment and run from an empty folder. At the lowest, kernels are compiled for H200 and v5p too; at the tested
# ones `make check-all` and CI do that.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD home=$PWD/.cache/versions uv=$PWD/.venv/bin/uv
export JAX_PLATFORMS=cpu
# Else the checkout could stand in for the wheel.
unset PYTHONPATH

say() { echo "versions: $*"; }

# install NAME RESOLUTION: an environment of the wheel alone, and an empty folder, in which the caller then is.
install() {
    local python=$home/$1/bin/python
    "$uv" venv --quiet --python "$root/.venv/bin/python" "$home/$1"
    # What the wheel asks for is taken at its lowest; what that asks for in turn is not.
    "$uv" pip compile --quiet --python "$python" --resolution "$2" --output-file "$home/$1.txt" pyproject.toml
    "$uv" pip install --quiet --python "$python" --constraint "$home/$1.txt" "$home"/dist/*.whl
    mkdir "$home/$1-empty"
    cd "$home/$1-empty"
}

# walk NAME: what the README does with an installed package, up to decoding with a model that was trained here.
walk() {
    local bin=$home/$1/bin model=runs/study2/8b_cpt-tiny/model
    say "$1: $("$bin/sdar-jax" --version), $("$bin/python" -c "import jax; print('jax', jax.__version__)")"
    "$bin/python" - <<'CHECK'
import sys

import sdar_jax

assert sdar_jax.__file__.startswith(sys.prefix), sdar_jax.__file__
missing = [name for name in sdar_jax.__all__ if not hasattr(sdar_jax, name)]
assert not missing, missing
CHECK
    "$bin/sdar-jax" doctor
    "$bin/sdar-jax" doctor --json >doctor.json
    "$bin/python" -c "import json; problems = json.load(open('doctor.json'))['problems']; assert not problems, problems"
    "$bin/sdar-jax" train study2/8b_cpt --tiny
    "$bin/sdar-jax" sample --model $model --prompt-ids 5,9,12 --max-new-tokens 12 --json
    "$bin/sdar-jax" sample --model $model --prompt "once upon" --max-new-tokens 12
}

# The compilers come by the command that `sdar-jax doctor` prints, which so is known to work.
compile_kernels() {
    local python=$home/$1/bin/python command
    command=$("$python" -c "import json; print(json.load(open('doctor.json'))['compilers']['install'])")
    say "$1: $command"
    VIRTUAL_ENV=$home/$1 eval "'$uv' $command --quiet"
    grep -E '^(beartype|hypothesis|pytest|pytest-timeout)==' "$root/constraints.txt" >tools.txt
    "$uv" pip install --quiet --python "$python" --requirement tools.txt
    cd "$root"
    COMPILERS=$home/$1-empty/.cache/compilers "$python" -m pytest -q -m "" -p no:cacheprovider \
        tests/compile/test_mosaic_gpu.py::test_h200_in_ci tests/compile/test_mosaic_tpu.py::test_compiles_for_v5p \
        "tests/compile/test_paged.py::test_compiles[h200]" "tests/compile/test_paged.py::test_compiles[v5p]"
}

rm -rf "$home"
"$uv" build --quiet --out-dir "$home/dist" .
install lowest lowest-direct
walk lowest
compile_kernels lowest
install newest highest
walk newest
say "ready in $SECONDS s"
