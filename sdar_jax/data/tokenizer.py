"""Tokenizers: read from a directory, and used in one way by training and decoding alike."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from sdar_jax.errors import CheckpointError, DataError


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local Hugging Face directory. Raises CheckpointError if there is none that can be read."""
    if not Path(path).is_dir():
        raise CheckpointError(f"{path}: no such directory; give one that holds tokenizer.json")
    # It would warn that it knows no `sdar` model; a tokenizer needs none.
    logging.set_verbosity_error()
    try:
        return AutoTokenizer.from_pretrained(str(path), local_files_only=True)
    # Whatever a damaged file makes the library raise, the answer is the same.
    except Exception as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(
            f"{path}: no tokenizer can be read from it ({reason[0]}); put a sound tokenizer.json there"
        ) from error


class Encoder:
    """Text to token ids, safe to call from several threads.

    `leading` is the begin-of-text token where the tokenizer sets one before every text, else empty. No other special
    token is ever added: an end is added by whoever ends a document.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        first = tokenizer.encode("", verbose=False)[:1]
        self.leading: list[int] = first if first == [tokenizer.bos_token_id] else []
        # The first call settles truncation and padding in the shared Rust object, which threads may not change.
        self("a")

    def __call__(self, text: str) -> list[int]:
        """Raises DataError if the text cannot be written as UTF-8."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"a lone surrogate at character {error.start}; write the text as valid Unicode") from error
        return self._tokenizer.encode(text, add_special_tokens=False, verbose=False)
