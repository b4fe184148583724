"""The package as an installed one: what it exports, what importing it costs, and what it is built from."""

import ast
import importlib
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest

import sdar_jax

PACKAGE = Path(sdar_jax.__file__).parent


@pytest.mark.parametrize("name", sdar_jax.__all__)
def test_every_public_name_can_be_used(name):
    assert getattr(sdar_jax, name) is getattr(
        importlib.import_module(f"sdar_jax.{sdar_jax._HOMES[name]}"), name
    )
    # A module of this name would take the name's place once something imports it.
    assert not (PACKAGE / f"{name}.py").exists() and not (PACKAGE / name).is_dir()


def test_type_checkers_and_the_interpreter_see_the_same_names():
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    imports = {name.name: node.module for node in block.body for name in node.names}
    assert imports == {name: f"sdar_jax.{home}" for name, home in sdar_jax._HOMES.items()}
    assert sorted(imports) == sdar_jax.__all__ and set(sdar_jax.__all__) <= set(dir(sdar_jax))


def test_names_that_do_not_exist():
    with pytest.raises(AttributeError, match="'sdar_jax' has no attribute 'generat'"):
        _ = sdar_jax.generat  # type: ignore
    assert not hasattr(sdar_jax, "__wrapped__")


def test_importing_the_package_imports_nothing_heavy():
    program = (
        "import sys, sdar_jax\n"
        "assert not {'jax', 'flax', 'numpy', 'transformers'} & set(sys.modules)\n"
        "assert sdar_jax.errors.SdarError is sys.modules['sdar_jax.errors'].SdarError"
    )
    subprocess.run([sys.executable, "-W", "error", "-c", program], check=True, cwd=PACKAGE.parent)


def test_version():
    assert sdar_jax.__version__ == importlib.metadata.version("sdar-jax")


def test_every_recipe_is_in_the_package():
    recipes = sorted(
        path.relative_to(PACKAGE / "recipes") for path in (PACKAGE / "recipes").glob("*/*.yaml")
    )
    configs = PACKAGE.parent / "configs"
    assert (
        recipes == sorted(path.relative_to(configs) for path in configs.rglob("*.yaml"))
        and len(recipes) > 30
    )


def test_private_parts_of_jax_are_used_in_one_module_alone():
    users = [path.name for path in PACKAGE.rglob("*.py") if "jax._src" in path.read_text()]
    assert users == ["compatibility.py"]
