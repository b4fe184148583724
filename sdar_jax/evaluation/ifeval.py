"""IFEval (arXiv 2311.07911): whether an answer follows the instructions of its prompt.

The checkers are those of lm-evaluation-harness (`pip install 'sdar-jax[ifeval]'`), which many published scores are made
with; none is written here.
"""

import contextlib
import functools
import io
import logging
from collections.abc import Callable, Mapping
from typing import Any

from sdar_jax.errors import ConfigError
from sdar_jax.evaluation.graders import Grade


def grade_ifeval(problem: Mapping[str, Any], text: str) -> Grade:
    """Checks every instruction of a prompt; the answer is right if it follows all, as it stands (prompt-level strict).

    Beside it the other published scores: each instruction by itself, and both on the loose reading, which forgives
    asterisks, a first and a last line.

    Args:
        problem: key, prompt, instruction_id_list and kwargs, as in the public file.

    Raises:
        ConfigError: the checkers or their data are not installed.
    """
    found = _checkers()(problem, [text])
    followed = [bool(each) for each in found["inst_level_strict_acc"]]
    missed = [
        name
        for name, right in zip(problem["instruction_id_list"], followed, strict=True)
        if not right
    ]
    return Grade(
        bool(found["prompt_level_strict_acc"]),
        text.strip() or None,
        f"does not follow {', '.join(missed)}" if missed else None,
        {
            "instruction_strict": followed,
            "prompt_loose": [bool(found["prompt_level_loose_acc"])],
            "instruction_loose": [bool(each) for each in found["inst_level_loose_acc"]],
        },
    )


@functools.cache
def _checkers() -> Callable[[Mapping[str, Any], list[str]], dict[str, Any]]:
    try:
        # Where nltk's data is not there, the import tries to download it, and says so.
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            import langdetect  # pyright: ignore[reportMissingImports]
            import nltk  # pyright: ignore[reportMissingImports]
            from lm_eval.tasks.ifeval.utils import (  # pyright: ignore[reportMissingImports]
                process_results,
            )
    except ImportError:
        raise ConfigError(
            "ifeval is graded by the checkers of lm-evaluation-harness, which are not installed: pip install"
            " 'sdar-jax[ifeval]'"
        ) from None
    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError:
        raise ConfigError(
            "ifeval's checkers need nltk's data punkt_tab, which is not there: python -m nltk.downloader punkt_tab, or"
            " set NLTK_DATA to a folder with tokenizers/punkt_tab"
        ) from None
    # It draws at random; so that a score does not depend on what was graded before.
    langdetect.DetectorFactory.seed = 0
    # A text without a language counts as right, and is not for the log.
    logging.getLogger("lm_eval.tasks.ifeval.instructions").setLevel(logging.CRITICAL)
    return process_results
