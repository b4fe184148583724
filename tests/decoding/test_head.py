"""More masked positions in a batch than the head takes at once."""

import numpy as np

from sdar_jax import DecodingConfig, generate
from sdar_jax.decoding import block_forward
from tests.tiny import MASK, padded, tiny_model


def test_many_rows_equal_few(x64):
    rows = block_forward._PROPOSALS // 4 + 40
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, MASK, rng.integers(0, 6)).tolist() for _ in range(rows)]
    config = DecodingConfig(temperature=1.0, top_k=7, top_p=0.9, confidence_threshold=0.3)
    told = dict(max_new_tokens=5, stop_token_ids=padded())
    together = generate(tiny_model(), prompts, config, seed=3, **told)
    for first in (0, rows - 4):
        apart = generate(tiny_model(), prompts[first : first + 4], config, seed=3 + first, **told)
        assert [(c.tokens, c.steps) for c in apart] == [
            (c.tokens, c.steps) for c in together[first : first + 4]
        ]
