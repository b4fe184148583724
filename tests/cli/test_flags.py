"""A command's messages name flags, and leave alone what is not a setting's name."""

import logging

import pytest

from sdar_jax.cli.flags import Flags

FLAGS = Flags({"block_size": "--block-size", "strategy": "--strategy", "seed": "--seed"})


@pytest.mark.parametrize(
    ("said", "told"),
    [
        ("block_size is 0; give a positive integer", "--block-size is 0; give a positive integer"),
        ("give DecodingConfig(block_size=...)", "give --block-size"),
        ("set it with load_pretrained(..., block_size=...)", "set it with --block-size"),
        ("give block_size=..., or not", "give --block-size, or not"),
        ("use strategy='sequential', or", "use --strategy sequential, or"),
        ("block_size=4.", "--block-size 4."),
        ("seed is 7; the seed is odd", "--seed is 7; the seed is odd"),
        ("no strategy", "no strategy"),
        ("/a/block_size: no file", "/a/block_size: no file"),
        ("model.block_size is 0", "model.block_size is 0"),
        ('"block_size" in the line', '"block_size" in the line'),
        ("a_block_size, block_sizes", "a_block_size, block_sizes"),
    ],
)
def test_a_message_in_a_commands_words(said: str, told: str) -> None:
    assert FLAGS(said) == told


def test_a_record_that_others_log_too_stays_as_it_is():
    record = logging.LogRecord("sdar_jax", logging.WARNING, "file", 1, "block_size=%d", (4,), None)
    assert FLAGS.filter(record).getMessage() == "--block-size 4"
    assert record.getMessage() == "block_size=4"
