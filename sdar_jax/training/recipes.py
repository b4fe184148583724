"""Configs that come with the package, each by its name: `study2/8b_cpt` is sdar_jax/recipes/study2/8b_cpt.yaml."""

import difflib
import functools
from importlib import resources
from pathlib import Path

from sdar_jax.errors import ConfigError

_FOLDER = resources.files("sdar_jax") / "recipes"


@functools.cache
def recipe_names() -> tuple[str, ...]:
    """Lists all of them, in order."""
    names = []
    for folder in _FOLDER.iterdir():
        if folder.is_dir():
            files = [file.name for file in folder.iterdir() if file.name.endswith(".yaml")]
            names += [f"{folder.name}/{file.removesuffix('.yaml')}" for file in files]
    return tuple(sorted(names))


def config_text(file_or_recipe: str | Path) -> str:
    """Reads a YAML file, or the recipe of that name; where there are both, the file is taken.

    Raises:
        ConfigError: there is neither, or the file cannot be read.
    """
    path = Path(file_or_recipe)
    if not path.is_file() and str(file_or_recipe) in recipe_names():
        return (_FOLDER / f"{file_or_recipe}.yaml").read_text()
    try:
        return path.read_text()
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); {_advice(path)}") from None


def _advice(path: Path) -> str:
    near = difflib.get_close_matches(str(path), recipe_names(), n=1)
    if near:
        return f"did you mean the recipe {near[0]}?"
    return (
        "give a YAML file"
        if path.suffix
        else f"give a YAML file, or a recipe such as {recipe_names()[-1]}"
    )
