"""How long requests may be, and how many pages the cache has, where an engine is not told."""

from collections.abc import Iterable
from typing import Any, NamedTuple

import jax

from sdar_jax.decoding.capacities import position_bytes
from sdar_jax.decoding.page_pool import check_page_size, default_page_size
from sdar_jax.errors import DecodingError
from sdar_jax.model import Model

# Tokens of prompt and output together, where nothing says how many: a model may allow a million, for which there is
# rarely memory.
DEFAULT_MAX_LENGTH = 4096
# Of a device's memory, the part that weights and pages may fill; the rest is for what a forward computes.
_USABLE = 0.9


class EngineSizes(NamedTuple):
    """Sizes of an engine.

    Attributes:
        max_length: the most tokens of prompt and output together.
        pages: of the cache.
        page_size: positions of a page.
    """

    max_length: int
    pages: int
    page_size: int


class Room(NamedTuple):
    """What limits the pages of a cache.

    Attributes:
        position_bytes: of keys and values of one position in all layers, on the device that holds most of them.
        free_bytes: on the device with least; None where that is not known, as on a CPU.
    """

    position_bytes: int
    free_bytes: int | None


def room_for_pages(model: Model) -> Room:
    """What there is beside the weights on the devices that hold a model."""
    devices = {device for leaf in jax.tree.leaves(model) for device in leaf.devices()}
    return Room(position_bytes(model), free_bytes(devices))


def free_bytes(devices: Iterable[Any]) -> int | None:
    """Bytes that arrays may still fill on each of these; None where a device does not say what it has."""
    found = []
    for device in devices:
        stats = device.memory_stats()
        if not stats or "bytes_limit" not in stats:
            return None
        found.append(int(_USABLE * stats["bytes_limit"]) - stats["bytes_in_use"])
    return max(min(found), 0)


def engine_sizes(
    room: Room,
    *,
    context: int,
    batch_slots: int,
    block_size: int,
    max_length: int | None,
    pages: int | None,
    page_size: int | None,
) -> EngineSizes:
    """Fills in what is None.

    `page_size` becomes 64 positions, or the next whole blocks. `max_length` becomes what `pages` hold, or 4096 where
    these are not given either; it is never more than the model's context. `pages` become what `batch_slots` requests of
    `max_length` need, or as many as there is memory for if these are fewer.

    Args:
        context: max_position_embeddings.

    Raises:
        ConfigError: a page_size that is not made of whole blocks.
        DecodingError: there is no memory for one request of the length that is asked for.
    """
    if page_size is None:
        page_size = default_page_size(block_size)
    check_page_size(page_size, block_size)
    if pages is not None:
        most = min(pages * page_size, context)
        return EngineSizes(most if max_length is None else min(max_length, most), pages, page_size)
    length = min(DEFAULT_MAX_LENGTH if max_length is None else max_length, context)
    # A block more than is asked for may be open.
    each = -(-(length + block_size) // page_size)
    pages = batch_slots * each
    if room.free_bytes is None:
        return EngineSizes(length, pages, page_size)
    fitting = room.free_bytes // (page_size * room.position_bytes)
    wanted = 1 if max_length is None else each
    if fitting < wanted:
        needed = wanted * page_size * room.position_bytes
        raise DecodingError(
            f"keys and values of {wanted * page_size} tokens need {needed / 1e9:.2f} GB and the device has "
            f"{room.free_bytes / 1e9:.2f} GB left for them; give Engine(...) a smaller max_length, or free memory"
        )
    pages = min(pages, fitting)
    return EngineSizes(min(length, pages * page_size), pages, page_size)
