"""Which compiled program of `generate` a batch is given."""

from sdar_jax.decoding.capacities import Capacity, roomy_capacity


def test_one_sequence_is_not_decoded_in_a_program_for_hundreds() -> None:
    program = ("a program of its own", __name__)
    take = lambda sequences: roomy_capacity(Capacity(sequences, 40, 4, 8), program, 8, 16)
    assert take(250).sequences == 256
    assert take(1).sequences == 1
    assert take(9).sequences == 16
    # What is compiled and near serves.
    assert take(20).sequences == 256
