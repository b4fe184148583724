"""A batch as it is when decoding begins."""

from sdar_jax.decoding.batches import make_batch
from sdar_jax.decoding.block_forward import BufferConfig
from sdar_jax.decoding.decode_state import DecodeState


def start_state(model, ids, configs, **options) -> tuple[DecodeState, BufferConfig]:
    batch = make_batch(model, ids, configs, **options)
    return batch.on_device(model), batch.config
