"""Tokenizers: read from a directory or the hub, and used in one way by training and decoding alike."""

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from sdar_jax.errors import CheckpointError, DataError
from sdar_jax.hf.released import model_directory

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase
else:
    # Imported when a tokenizer is loaded: transformers takes more than a second, and ids alone need none.
    PreTrainedTokenizerBase = Any


def load_tokenizer(path_or_hub_id: str | Path) -> PreTrainedTokenizerBase:
    """Loads the tokenizer of a Hugging Face directory or hub id, of which only the tokenizer's files are fetched.

    tokenizer.json decides how text is read, whatever model lies with it; a directory without one is read by the class
    that its configs name. Code that a directory holds is never run, and no question is asked.

    Raises:
        CheckpointError: there is no tokenizer, or none that can be read.
    """
    from transformers.utils import logging

    directory = model_directory(path_or_hub_id, weights=False)
    # By its model type AutoTokenizer may choose a class that puts a pre-tokenizer of its own in place of the file's.
    if (directory / "tokenizer.json").is_file():
        from transformers import PreTrainedTokenizerFast as kind  # noqa: N813
    else:
        from transformers import AutoTokenizer as kind  # noqa: N813
    # It would warn that it knows no `sdar` model; a tokenizer needs none.
    logging.set_verbosity_error()
    try:
        return kind.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    # Whatever a damaged file makes the library raise, the answer is the same.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(": ")
        raise CheckpointError(
            f"{directory}: no tokenizer can be read from it ({reason}); put a sound tokenizer.json there"
        ) from error


class TokenIds(NamedTuple):
    """The ids that a tokenizer gives out.

    Attributes:
        size: the largest id of a token, the mask's left out, plus one. Ids may have gaps, so this is not
            `len(tokenizer)`.
        mask: the id of the tokenizer's own mask token, None if it has none.
    """

    size: int
    mask: int | None

    @property
    def largest(self) -> int:
        """The largest id of all, the mask's among them."""
        return max(self.size - 1, -1 if self.mask is None else self.mask)


def token_ids(tokenizer: PreTrainedTokenizerBase) -> TokenIds:
    """Finds the ids that the tokenizer gives out, those of added tokens among them."""
    added = {token.content: number for number, token in tokenizer.added_tokens_decoder.items()}
    ids = {**tokenizer.get_vocab(), **added}
    mask = None if tokenizer.mask_token is None else ids.get(str(tokenizer.mask_token))
    return TokenIds(1 + max((used for used in ids.values() if used != mask), default=-1), mask)


class Encoder:
    """Turns text into token ids, safe to call from several threads.

    `leading` is what the tokenizer sets before every text, begin-of-text as a rule; mostly it is empty. What it would
    set behind a text is never added: an end is added by whoever ends a document, and a prompt has none.

    Args:
        tokenizer: a Hugging Face tokenizer, or another object with such an `encode`.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        # The first call settles truncation and padding in the shared Rust object, which threads may not change.
        try:
            self.leading = self._leading(self("a"))
        except DataError:
            self.leading = self._leading([])

    def _leading(self, letter: list[int]) -> list[int]:
        """Finds what precedes the ids of "a" where the tokenizer sets what it sets around every text."""
        ids = self._tokenizer.encode("a" if letter else "", verbose=False)
        if letter:
            starts = (i for i in range(len(ids)) if ids[i : i + len(letter)] == letter)
            return ids[: next(starts, 0)]
        # Of a tokenizer without letters nothing tells what precedes a text from what follows it.
        return ids[:1] if ids[:1] == [self._tokenizer.bos_token_id] else []

    def __call__(self, text: str) -> list[int]:
        """Encodes a stretch of text, with nothing added.

        Raises DataError if it cannot be written as UTF-8, or holds what the tokenizer has no token for and no other
        token to put in its place.
        """
        check_unicode(text)
        try:
            return self._tokenizer.encode(text, add_special_tokens=False, verbose=False)
        except Exception as error:  # the Rust library raises no narrower type
            raise DataError(
                f"text that the tokenizer cannot read ({error}); leave out what it has no token for, or give it an "
                "unknown token"
            ) from error

    def prompt(self, text: str) -> list[int]:
        """Encodes a text that is to be continued: `leading` and the text's ids. Raises DataError as a call does."""
        return [*self.leading, *self(text)]


def check_unicode(text: str) -> None:
    """Raises DataError if the text holds half of a character, which UTF-8 cannot write."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        code = ord(text[error.start])
        # Python reads a byte that is not UTF-8 from a command line or a pipe as one of these.
        byte = (
            f", byte 0x{code - 0xDC00:02x} of text that is not UTF-8 or was cut"
            if 0xDC80 <= code <= 0xDCFF
            else ""
        )
        raise DataError(
            f"a lone surrogate at character {error.start} (U+{code:04X}{byte}: half of a character); write it as valid "
            "Unicode"
        ) from None
