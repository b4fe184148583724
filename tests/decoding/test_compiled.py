"""The decoder's program for a TPU, compiled where none is."""

import json

import pytest

from tests.compilers import needs_compilers, run_python

_COMPILE = """
import json, math, re
from dataclasses import replace
from benchmarks.decode_roofline import compile_for
from sdar_jax import ModelConfig

model = replace(ModelConfig.preset("sdar-1.7b"), num_layers=2, vocab_size=1024, mask_token_id=1023)
compiled = compile_for("v6e", model, 1, 4, 256)
copies = re.findall(r" = bf16\\[([0-9,]+)\\]\\S* (?:copy|transpose)\\(", compiled.as_text())
print(json.dumps({
    "largest": max(math.prod(map(int, shape.split(","))) for shape in copies),
    "temporaries": compiled.memory_analysis().temp_size_in_bytes,
    "smallest": model.hidden_size * model.num_heads * model.head_dim,
}))
"""


@pytest.mark.slow
@pytest.mark.ci
@needs_compilers
def test_no_weight_is_laid_out_anew_on_a_tpu() -> None:
    """What is copied is smaller than the smallest matrix of a layer, and so are all temporaries."""
    run = run_python(_COMPILE)
    assert run.returncode == 0, run.stderr[-2000:]
    found = json.loads(run.stdout.splitlines()[-1])
    assert found["largest"] < found["smallest"] / 2
    assert found["temporaries"] < 2 * found["smallest"] * 4
