"""Benchmarks as an evaluator, which `train` calls now and then."""

from collections.abc import Callable
from typing import Any

import jax

from sdar_jax.decoding import DecodingConfig
from sdar_jax.errors import ConfigError
from sdar_jax.evaluation.benchmarks import encoder, evaluate
from sdar_jax.evaluation.config import EvalConfig
from sdar_jax.evaluation.tasks import load_tasks
from sdar_jax.model import Model


def task_scores(config: EvalConfig, tokenizer: Any) -> Callable[[Model, int], dict[str, float]]:
    """Makes an evaluator: of each of `config.tasks` its score, under its name, and the tokens a forward, as NAME_tpf.

    Raises:
        ConfigError: a task that runs programs, or several processes. DataError: problems that cannot be read.
    """
    if jax.process_count() > 1:
        raise ConfigError("eval.tasks decode in one process, and this job has more; leave them out")
    tasks = load_tasks(config.tasks)
    for task, _ in tasks:
        if task.runs_code:
            raise ConfigError(
                f"eval.tasks names {task.name}, which runs programs; use `sdar-jax evaluate --allow-code` for it"
            )

    # Now, and not hours later: problems that the chat template refuses.
    encode = encoder(tokenizer, config.plain, {})
    for _, problems in tasks:
        for problem in problems[: config.limit]:
            encode(problem)

    def score(model: Model, step: int) -> dict[str, float]:
        results = evaluate(
            model,
            tokenizer,
            tasks,
            DecodingConfig(**config.decoding),
            max_new_tokens=config.max_new_tokens,
            limit=config.limit,
            batch_size=config.batch_size,
            plain=config.plain,
        )
        numbers = {}
        for result in results:
            numbers |= {result.task: result.score, f"{result.task}_tpf": result.tokens_per_forward}
        return numbers

    return score
