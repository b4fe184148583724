"""The batch on the device: its state, and every change that is made to it. It knows no queue."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from sdar_jax.decoding.block_forward import BufferConfig
from sdar_jax.decoding.buffer import Decoder
from sdar_jax.decoding.commit_rules import CommitRule
from sdar_jax.decoding.decode_state import DecodeState, SequenceState
from sdar_jax.decoding.engine.scheduler import Admission
from sdar_jax.decoding.engine.weights import committed
from sdar_jax.decoding.transfers import HostView, copy_page, end_sequence, put_sequence, set_pages
from sdar_jax.devices.sharding import mesh_of
from sdar_jax.model import Model, pages_for


class ModelRunner:
    """A model's weights, and the state of a batch that it decodes.

    Args:
        model: with its layers unstacked.
        config: of the compiled program.
        idle: the state of an empty slot.
        slots: of the batch.
        pages: how many, and positions of each.
        banned: bool [V], tokens that are never proposed; None is none.

    Attributes:
        model: whose weights decode.
    """

    def __init__(
        self,
        model: Model,
        config: BufferConfig,
        *,
        idle: SequenceState,
        slots: int,
        pages: tuple[int, int],
        banned: np.ndarray | None,
    ):
        self.model = committed(model)
        self._config = config
        self._decode = Decoder(self.model, config)
        self._idle = jax.tree.map(lambda x: np.stack([x] * slots), idle)
        self._like = idle
        self._pages = pages
        self._banned = banned

    def reset(self) -> None:
        """Builds the state anew: every slot and every page is empty."""
        # The old pages go before there are new ones.
        self.state = DecodeState(
            jax.tree.map(jnp.asarray, self._idle), [], jax.device_put(self._banned)
        )
        self.state = self.state._replace(cache=pages_for(self.model, *self._pages))
        if mesh_of(self.model) is None:
            # Committed as the weights are, and as the state comes back from a call, or that would be compiled twice.
            place = jax.tree.leaves(self.model)[0].sharding
            if isinstance(place, NamedSharding):
                place = NamedSharding(place.mesh, PartitionSpec())
            self.state = jax.device_put(self.state, place)

    def update_weights(self, model: Model) -> None:
        """Decodes with these weights from now on (see `weights.replacement`); nothing is compiled."""
        self.model = model
        self._decode = Decoder(self.model, self._config)

    def admit(self, admission: Admission) -> None:
        """Puts a request's state into its slot, and copies the page that it shares in part."""
        if admission.copy is not None:
            self.state = self.state._replace(cache=copy_page(self.state.cache, *admission.copy))
        slot = admission.request.slot
        assert slot is not None
        self.state = self.state._replace(
            batch=put_sequence(self.state.batch, slot, admission.sequence)
        )

    def end(self, slot: int) -> None:
        """Empties a slot whose sequence had not ended."""
        self.state = self.state._replace(batch=end_sequence(self.state.batch, slot))

    def set_pages(self, tables: np.ndarray, ends: np.ndarray) -> None:
        """Sets the page tables of all slots, int32 [slots, M], and the positions that they cover, int32 [slots]."""
        self.state = self.state._replace(batch=set_pages(self.state.batch, tables, ends))

    def run(self, steps: int, rules: tuple[CommitRule, ...]) -> HostView:
        """Starts a call of at most so many steps, with these commit rules; what it leaves, which waits for its end."""
        if rules != self._config.rules:
            self._config = replace(self._config, rules=rules)
            self._decode = Decoder(self.model, self._config)
        self.state, found = self._decode(self.state, steps)
        return HostView(found, self._like)
