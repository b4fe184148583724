"""The command itself: its help, its commands, and what it says of others."""

import subprocess
import sys

import pytest

import sdar_jax
from sdar_jax import cli


def test_help_is_quick():
    """Nothing heavy is imported for it."""
    program = (
        "import sys\nfrom sdar_jax import cli\ntry:\n    cli.main(['--help'])\nexcept SystemExit as stop:\n"
        "    assert stop.code == 0 and not {'jax', 'numpy', 'transformers'} & set(sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert all(f"\n  {name} " in done.stdout for name in cli._COMMANDS)


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out == f"sdar-jax {sdar_jax.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["trian"], ["--tiny"]])
def test_what_is_no_command_is_status_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments)
    assert stop.value.code == 2 and "COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize("command", cli._COMMANDS)
def test_every_command_has_help_under_its_name(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([command, "--help"])
    assert stop.value.code == 0 and f"usage: sdar-jax {command}" in capsys.readouterr().out
