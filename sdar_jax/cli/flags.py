"""Messages in the words of a command: a setting that the library calls by its field is called by its flag."""

import contextlib
import copy
import logging
import re
from collections.abc import Iterator, Mapping


class Flags:
    """Puts flags in the place of fields, in text.

    Args:
        flags: the flag of each field. A field whose name is one word, which a sentence may hold, is replaced only where
            a value is given to it, or where it begins a message that says what it is.
    """

    def __init__(self, flags: Mapping[str, str]):
        self._flags = flags
        every = "|".join(flags)
        long = "|".join(name for name in flags if "_" in name)
        # Not in a path, in quotes or in a longer name, which are the user's or another file's.
        before, behind = r"(?<![\w./'\"-])", r"(?![\w/'\"-])"
        self._patterns = (
            re.compile(rf"\b(?:DecodingConfig|load_pretrained)\((?:\.\.\., )?({every})=\.\.\.\)"),
            re.compile(rf"{before}({every})=(?:\.\.\.|'?([\w.-]*\w)'?)"),
            re.compile(rf"{before}({long}){behind}"),
            re.compile(rf"^({every})(?= is )"),
        )

    def __call__(self, text: str) -> str:
        """Returns the text with a flag for each field."""
        for pattern in self._patterns:
            text = pattern.sub(self._flag, text)
        return text

    def _flag(self, found: re.Match[str]) -> str:
        value = found[2] if len(found.groups()) > 1 else None
        return self._flags[found[1]] + (f" {value}" if value else "")

    def filter(self, record: logging.LogRecord) -> logging.LogRecord:
        """Does the same with a message that is logged, as a filter of a handler. What others log stays as it is."""
        own = copy.copy(record)
        own.msg = self(record.getMessage())
        own.args = ()
        return own


@contextlib.contextmanager
def warnings_in(flags: Flags) -> Iterator[None]:
    """Prints what the library warns of to stderr, in these words."""
    handler = logging.StreamHandler()
    handler.setLevel(logging.WARNING)
    handler.addFilter(flags)
    logger = logging.getLogger("sdar_jax")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
