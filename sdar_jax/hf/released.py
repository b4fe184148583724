"""What a released model is: its directory, on this machine or fetched, and its config with what its files leave out."""

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

from sdar_jax.errors import CheckpointError, is_int
from sdar_jax.hf.model_files import CARRIED_FILES, GENERATION_FILE
from sdar_jax.hf.tensor_files import INDEX_FILE
from sdar_jax.model.config import ModelConfig
from sdar_jax.model.hf_config import family_of
from sdar_jax.model.hf_fields import GENERATION_HARMLESS, unread_fields, warn_once
from sdar_jax.paradigm import fills_masks

log = logging.getLogger(__name__)


def model_directory(path_or_hub_id: str | Path, *, weights: bool = True) -> Path:
    """Finds a model on this machine; a hub id is fetched, without its weights if they are not wanted.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path_or_hub_id)
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(
            f"{path}: is a file; give the directory that holds it and its config.json"
        )
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path_or_hub_id)):
        raise CheckpointError(
            f"{path}: no such directory; give a Hugging Face model directory, or a hub id (org/name)"
        )
    try:
        patterns = ["config.json", *CARRIED_FILES]
        patterns += ["*.safetensors", INDEX_FILE] if weights else []
        return Path(snapshot_download(str(path_or_hub_id), allow_patterns=patterns))
    except (OSError, ValueError) as error:
        reason = str(error).split("\n")[0]
        raise CheckpointError(
            f"{path}: no such directory, and the Hugging Face hub did not provide it ({reason}); check the name and "
            "the connection"
        ) from None


def read_model_config(
    path_or_hub_id: str | Path, *, block_size: int | None = None, mask_token_id: int | None = None
) -> ModelConfig:
    """Reads the config of a directory or hub id, with the stop tokens of its generation_config.json.

    Released configs of models that fill masks leave out what their users have to know. The mask is then the tokenizer's
    `mask_token`, by its id; the block size the N of a name that ends in -bN; either else the usual one of its family
    (`FAMILIES`); and where one `model_type` stands for two objectives, the name tells which. One warning says what was
    taken. What is given counts, and is not spoken of.

    Raises:
        CheckpointError: a file that is missing or damaged. ConfigError: a family or value that is not supported.
    """
    directory = model_directory(path_or_hub_id)
    config = ModelConfig.from_hf(directory)
    taken: dict[str, tuple[Any, str]] = {}
    name = released_name(directory)
    if fills_masks(config.objective):
        named = _named_purpose(config, directory, name)
        config = replace(config, **named)
        taken = {
            **_objective(config, name, named),
            **_block_size(config, name, block_size),
            **_mask(config, directory, mask_token_id),
        }
    given = {"block_size": block_size, "mask_token_id": mask_token_id}
    changes: dict[str, Any] = {field: value for field, (value, _) in taken.items()}
    changes |= {field: value for field, value in given.items() if value is not None}
    changes |= _stop_tokens(directory)
    if taken:
        found = ", ".join(f"{field} {value} ({why})" for field, (value, why) in taken.items())
        ways = [f"{field}=..." for field in given if field in taken]
        ways += ['"objective" in config.json'] if "objective" in taken else []
        warn_once(
            f"{name}: config.json does not say all; taken: {found}; to say otherwise give {', '.join(ways)}"
        )
    return replace(config, **changes)


def released_name(directory: Path) -> str:
    """Returns a model's name: its directory's; its repository's in the hub's cache, whose directories are hashes."""
    path = directory.resolve()
    if path.parent.name == "snapshots" and path.parents[1].name.startswith("models--"):
        return path.parents[1].name.rpartition("--")[2]
    return path.name


def _named_purpose(config: ModelConfig, directory: Path, name: str) -> dict[str, Any]:
    """Finds the purpose of a family whose config.json does not tell it, by the model's name; the family's own if that
    has no part of it either. Empty where config.json tells it."""
    _, family = family_of(config)
    if not family.named or "objective" in read_json(directory / "config.json"):
        return {}
    found = (purpose for part, purpose in family.named.items() if part in name.lower())
    return dict(next(found, family.purpose))


def _objective(config: ModelConfig, name: str, named: dict[str, Any]) -> dict[str, tuple[Any, str]]:
    if not named:
        return {}
    told = any(part in name.lower() for part in family_of(config)[1].named)
    return {"objective": (config.objective, "by its name" if told else "the usual one")}


def _block_size(
    config: ModelConfig, name: str, block_size: int | None
) -> dict[str, tuple[Any, str]]:
    usual = family_of(config)[1].block_size
    if block_size is not None or config.block_size is not None or usual is None:
        return {}
    if suffix := re.search(r"-b([1-9]\d*)$", name):
        return {"block_size": (int(suffix[1]), "the name ends so")}
    return {"block_size": (usual, "the usual one")}


def _mask(
    config: ModelConfig, directory: Path, mask_token_id: int | None
) -> dict[str, tuple[Any, str]]:
    if mask_token_id is not None or config.mask_token_id is not None:
        return {}
    mask = _tokenizers_mask(directory)
    if mask is not None:
        return {"mask_token_id": (mask, "the tokenizer's mask_token")}
    usual = family_of(config)[1].mask_token_id
    return {} if usual is None else {"mask_token_id": (usual, "the usual one")}


def _tokenizers_mask(directory: Path) -> int | None:
    """Finds the id of the tokenizer's mask token, which its files may spell in several ways; None if it has none."""
    settings = read_json(directory / "tokenizer_config.json")
    special = read_json(directory / "special_tokens_map.json")
    spelled = [_content(table.get("mask_token")) for table in (settings, special)]
    wanted = [text for text in spelled if text is not None]
    if not wanted:
        return None
    for ids in _added_tokens(directory, settings):
        found = [ids[text] for text in wanted if is_int(ids.get(text))]
        if found:
            return found[0]
    return None


def _added_tokens(directory: Path, settings: dict[str, Any]) -> Iterator[dict[str | None, Any]]:
    """Yields the ids of added tokens as each of the tokenizer's files has them; the largest is read last."""
    decoder = settings.get("added_tokens_decoder")
    decoder = decoder if isinstance(decoder, dict) else {}
    yield {_content(token): int(number) for number, token in decoder.items() if number.isdecimal()}
    yield {**read_json(directory / "added_tokens.json")}
    tokenizer = read_json(directory / "tokenizer.json")
    yield {_content(token): token.get("id") for token in tokenizer.get("added_tokens") or []}
    # A list where the tokenizer is a unigram model.
    vocabulary = (tokenizer.get("model") or {}).get("vocab")
    yield {**vocabulary} if isinstance(vocabulary, dict) else {}


def _content(token: Any) -> str | None:
    """Returns the text of a token, which is itself or in an object's "content"."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _stop_tokens(directory: Path) -> dict[str, tuple[int, ...]]:
    """Reads the stop tokens of generation_config.json, if it has any, and warns of what of it is not applied."""
    file = directory / GENERATION_FILE
    generation = read_json(file)
    if unread := unread_fields(generation, GENERATION_HARMLESS):
        log.warning(
            "%s: not applied: %s; say what decoding needs of them in DecodingConfig",
            file,
            ", ".join(unread),
        )
    stop = generation.get("eos_token_id")
    if stop is None:
        return {}
    stops = stop if isinstance(stop, list) else [stop]
    if not all(map(is_int, stops)):
        raise CheckpointError(
            f"{file}: eos_token_id is {stop!r}; give a token id, or a list of them"
        )
    return {"stop_token_ids": tuple(stops)}


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object; an empty one where there is no file."""
    try:
        values = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise CheckpointError(f"{path}: not JSON ({error}); restore or remove the file") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path}: not a JSON object; restore or remove the file")
    return values
