"""Weights that take the place of others in a compiled program."""

import dataclasses

import jax
from jaxtyping import Array

from sdar_jax.errors import DecodingError
from sdar_jax.model import Model, unstack_layers


def committed(model: Model) -> Model:
    """The same weights, committed to the devices that they are on: a program is compiled for where its arguments are.

    A model that was just made is not committed, one that was loaded or trained is: without this, one in the place of
    the other would be compiled for anew.
    """
    return jax.tree.map(lambda weight: jax.device_put(weight, weight.sharding), model)


def replacement(old: Model, new: Model) -> Model:
    """The weights of `new`, in the structure and on the devices of `old`, whose layers are unstacked.

    Raises:
        DecodingError: names the first weight that is missing or has another shape or dtype, or the first field of the
            config that differs.
    """
    new = unstack_layers(new)
    ours, theirs = _by_name(old), _by_name(new)
    for name in [*ours, *theirs]:
        before, after = _described(ours.get(name)), _described(theirs.get(name))
        if before != after:
            raise DecodingError(
                f"weight {name} is {after} and the engine's is {before}; give a model of the same shapes, or make "
                "another Engine"
            )
    for field in dataclasses.fields(old.config):
        before, after = getattr(old.config, field.name), getattr(new.config, field.name)
        if before != after:
            raise DecodingError(
                f"the model's {field.name} is {after!r} and the engine's {before!r}; make another Engine for it"
            )
    placed = [jax.device_put(theirs[name], weight.sharding) for name, weight in ours.items()]
    return jax.tree.unflatten(jax.tree.structure(old), placed)


def _by_name(model: Model) -> dict[str, Array]:
    leaves = jax.tree_util.tree_leaves_with_path(model)
    return {_name(path): leaf for path, leaf in leaves}


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")


def _described(weight: Array | None) -> str:
    return "missing" if weight is None else f"{weight.dtype.name} {list(weight.shape)}"
