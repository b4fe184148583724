"""The speed profile: counts that are exact, times that add up, bad input."""

import json

import jax.numpy as jnp
import pytest

from sdar_jax import DecodingConfig, save_pretrained
from sdar_jax.cli import main
from sdar_jax.errors import ConfigError
from sdar_jax.evaluation.profile import profile
from tests.bad_input import message_of
from tests.tiny import tiny_model

STATIC = DecodingConfig(strategy="low_confidence_static", denoising_steps=2)
FEW = {"prompt_length": 8, "new_tokens": 16, "repeats": 1}


def test_tokens_a_forward_are_those_that_were_asked_for():
    model = tiny_model(jnp.float32)
    found = list(profile(model, STATIC, batches=(1, 3), block_sizes=(4, 2), **FEW))
    assert [(each.block_size, each.batch) for each in found] == [(4, 1), (4, 3), (2, 1), (2, 3)]
    # Two tokens a forward of a block of 4, one of a block of 2.
    assert [each.tokens_per_forward for each in found] == [2.0, 2.0, 1.0, 1.0]
    for each in found:
        assert 0 < each.low <= each.tokens_per_second <= each.high
        assert each.per_row == pytest.approx(each.tokens_per_second / each.batch)


def test_autoregressive_models():
    model = tiny_model(jnp.float32, objective="autoregressive", block_size=None, mask_token_id=None)
    (found,) = profile(model, batches=(2,), **FEW)
    assert found.block_size is None and found.tokens_per_forward == 1.0


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"batches": (0,)}, "batches[0] is 0; give a positive integer"),
        ({"block_sizes": (4, -1)}, "block_sizes[1] is -1; give a positive integer"),
        ({"new_tokens": 0}, "new_tokens is 0; give a positive integer"),
        ({"repeats": 0}, "repeats is 0; give a positive integer"),
        ({"prompt_length": 10**6}, "are past the context of"),
    ],
)
def test_numbers_that_do_not_fit(options, told):
    measure = lambda: list(profile(tiny_model(jnp.float32), **({"batches": (1,)} | FEW | options)))
    assert told in message_of(ConfigError, measure)


def test_the_command(tmp_path, capsys):
    save_pretrained(tiny_model(jnp.float32), tmp_path / "model")
    options = [
        "profile",
        "--model",
        str(tmp_path / "model"),
        "--batches",
        "1,2",
        "--new-tokens",
        "8",
    ]
    options += ["--prompt-length", "4", "--repeats", "1", "--strategy", "low_confidence_static"]
    assert main([*options, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [(each["batch"], each["block_size"]) for each in found] == [(1, 4), (2, 4)]
    assert all(each["tokens_per_forward"] == 1.0 for each in found)
    assert main(options) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3 and lines[0].split()[:3] == ["block", "batch", "TPF"]
    for bad, told in (
        (["--batches", "x"], "--batches is 'x', no list of numbers"),
        (["--batches", "0"], "is 0"),
    ):
        assert main([*options, *bad]) == 2
        assert told in capsys.readouterr().err
