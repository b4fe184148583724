"""What is used of JAX that is private: it may change with any version, and is looked at here alone.

Kernels, sharding and the rest use public names that are the same in all versions that pyproject.toml allows.
"""

from collections.abc import Container
from typing import Any

from jax._src import distributed
from jax._src.clusters import ClusterEnv
from jax.errors import JaxRuntimeError


def cluster_name(known: Container[str]) -> str | None:
    """Returns JAX's name of the cluster that started this process, if it is one of `known`."""
    found = (
        kind.name
        for kind in ClusterEnv._cluster_types
        if kind.name in known and kind.is_env_present()
    )
    return next(found, None)


def cluster_place(
    name: str, address: str | None, devices: list[int] | None, timeout: float
) -> tuple[str, int, int, list[int] | None]:
    """Reads what a cluster says of this process, but for what is given: address, count, index, local devices (None for
    all).

    Raises anything where its environment is garbled.
    """
    detect = ClusterEnv.auto_detect_unset_distributed_params
    found_address, count, index, found_devices = detect(
        address, None, None, devices, name, int(timeout)
    )
    return (
        str(found_address),
        int(count or 1),
        int(index or 0),
        list(found_devices) if found_devices else None,
    )


def share(key: str, text: str) -> None:
    """Gives a text to all processes of the job, which need not wait for it, nor compute."""
    client: Any = distributed.global_state.client
    client.key_value_set(key, text, allow_overwrite=True)


def get_shared(key: str, timeout: float) -> str | None:
    """Returns what another process shares, or will within so many seconds; None if none does."""
    client: Any = distributed.global_state.client
    try:
        return client.blocking_key_value_get(key, int(timeout * 1000))
    except JaxRuntimeError:
        return None
