"""What made a file of answers, in a file beside it, so that a rerun never mixes answers of two models or settings."""

import json
import sys
from pathlib import Path
from typing import Any

from sdar_jax.errors import DataError


def settings_file(output: Path) -> Path:
    return output.with_name(f"{output.name}.settings.json")


def check_settings(
    output: Path, answers: int, model: str, fingerprint: str, settings: dict[str, Any]
) -> None:
    """Raises DataError if the answers that a file holds come from another model, or from other settings.

    Args:
        answers: how many there are. If nothing says what made them, a line on stderr says that they are kept.
        model: its name, for messages; `fingerprint` is what tells models apart.
        settings: those that are not at their default.
    """
    if not answers:
        return
    file = settings_file(output)
    if not file.exists():
        print(
            f"{output}: nothing says what made its {answers} answers; they are kept",
            file=sys.stderr,
        )
        return
    try:
        before = json.loads(file.read_text(encoding="utf-8"))
        made_by, of_weights, made_with = (
            before["model"],
            before["fingerprint"],
            dict(before["settings"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(
            f"{file}: cannot be read ({error!r}); remove it, or choose another --output"
        ) from None
    if of_weights != fingerprint:
        now = "which has changed since" if made_by == model else f"and the model is now {model}"
        raise DataError(
            f"{output}: holds answers of the model {made_by}, {now}; choose another --output"
        )
    names = sorted({*made_with, *settings})
    was = lambda values, name: values.get(name, "the default")
    changed = [
        f"{name} was {was(made_with, name)} and is {was(settings, name)}"
        for name in names
        if made_with.get(name) != settings.get(name)
    ]
    if changed:
        differences = ", ".join(changed)
        raise DataError(
            f"{output}: holds answers made otherwise: {differences}; give what it was, or choose another --output"
        )


def write_settings(output: Path, model: str, fingerprint: str, settings: dict[str, Any]) -> None:
    """Raises DataError if it cannot be written."""
    text = json.dumps({"model": model, "fingerprint": fingerprint, "settings": settings}, indent=2)
    try:
        settings_file(output).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise DataError(
            f"{settings_file(output)}: cannot be written ({error}); choose another --output"
        ) from None
