"""Evaluates a model on benchmarks: scores with their intervals, and what the answers cost.

    sdar-jax evaluate --model DIR --tasks gsm8k,math500 --output results
    sdar-jax evaluate --model DIR --tasks gsm8k=gsm8k_test.jsonl --limit 100 --output results
    sdar-jax evaluate --model DIR --tasks humaneval,mbpp --allow-code --output results
    sdar-jax evaluate --model DIR --tasks gsm8k --thresholds 0.8,0.9,0.95 --block-sizes 4,8 --output results
    sdar-jax evaluate --model DIR --tasks math500 --samples 8 --temperature 1 --output results

Tasks: gsm8k, math500, humaneval, mbpp (sanitized), ifeval, mmlu, each read from the Hugging Face hub, or as NAME=PATH
from files in its public form. Prompts are those of the published scores, through the model's chat template. Every
answer is written to OUTPUT as it comes, with what it cost; started again with the same words, an evaluation goes on
where it was, and another model or other settings are refused. OUTPUT/results.json holds the scores.
"""

import dataclasses
import itertools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from sdar_jax.cli.decoding import DecodingFlags, flags_of, load_model, run_command
from sdar_jax.cli.sample import parse_variables
from sdar_jax.data.tokenizer import load_tokenizer
from sdar_jax.decoding.output_settings import check_settings, settings_file, write_settings
from sdar_jax.devices.chips import check_backend
from sdar_jax.errors import ConfigError
from sdar_jax.evaluation.benchmarks import Result, evaluate
from sdar_jax.evaluation.tasks import load_tasks
from sdar_jax.hf.model_files import fingerprint
from sdar_jax.hf.released import model_directory


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """Evaluate a block-diffusion or autoregressive model on benchmarks.

    Attributes:
        model: a Hugging Face directory, or a hub id.
        tasks: comma-separated names, each as NAME or NAME=PATH of its files.
        output: a folder for answers and scores.
        adapter: a directory of low-rank matrices (LoRA) in PEFT's files for that model.
        dtype: of the weights: auto (bfloat16 on GPU and TPU, float32 on CPU), int8, or a name.
        mask_token_id: where the model's config.json has none.
        tensor: devices that share heads, feed-forward width and vocabulary; -1 is all that are here.
        max_new_tokens: of an answer, at most.
        samples: answers to each problem; above 1 with a temperature, and with votes and pass@k.
        seed: for sampling.
        limit: only so many problems of each task, the first ones.
        batch_size: problems decoded at once.
        thresholds: comma-separated confidence thresholds to evaluate one after the other.
        block_sizes: comma-separated block sizes to evaluate one after the other.
        plain: problems as text, for a model without a chat template.
        chat_template_kwargs: variables of the chat template, as a JSON object.
        allow_code: run the programs that the model writes, which humaneval and mbpp need: in a child process with
            limits of time, memory and files, and no network. Not a prison: distrusted models belong in a container.
        window_slots: K, blocks that one forward may read; with an add_threshold below 1, so many are filled at once.
        decoding: how to decode.
    """

    model: str
    tasks: str
    output: Path
    adapter: Path | None = None
    dtype: str = "auto"
    mask_token_id: int | None = None
    tensor: int = 1
    max_new_tokens: int = 4096
    samples: int = 1
    seed: int = 0
    limit: int | None = None
    batch_size: int = 8
    thresholds: str | None = None
    block_sizes: str | None = None
    plain: bool = False
    chat_template_kwargs: str | None = None
    allow_code: bool = False
    window_slots: int = 2
    decoding: Annotated[DecodingFlags, tyro.conf.arg(name="")] = DecodingFlags()


_FLAGS = flags_of(EvaluateConfig, DecodingFlags)
# What the answers of a folder do not depend on: more tasks, problems or samples may be asked for later.
_FREE = {
    *("model", "tasks", "output", "adapter", "tensor", "limit", "samples", "batch_size"),
    *("thresholds", "block_sizes", "allow_code", "decoding"),
}


def main(arguments: Sequence[str] | None = None, program: str = "sdar-jax evaluate") -> int:
    """Evaluates; returns the exit status."""
    return run_command(
        EvaluateConfig,
        _run,
        arguments,
        program,
        description=__doc__,
        flags=_FLAGS,
        interrupted="interrupted; the same command goes on",
    )


def _run(config: EvaluateConfig) -> int:
    check_backend()
    variables = parse_variables(config.chat_template_kwargs)
    settings = list(_sweep(config))
    tasks = load_tasks([name for name in config.tasks.split(",") if name])
    directory = model_directory(config.model)
    tokenizer = load_tokenizer(directory)
    for decoding, folder in settings:
        _check_folder(config, decoding, folder, directory)
    model = load_model(
        directory,
        dtype=config.dtype,
        block_size=config.decoding.block_size,
        mask_token_id=config.mask_token_id,
        tensor=config.tensor,
        adapter=config.adapter,
    )
    rows: list[dict[str, Any]] = []
    for decoding, folder in settings:
        results = evaluate(
            model,
            tokenizer,
            tasks,
            decoding,
            max_new_tokens=config.max_new_tokens,
            samples=config.samples,
            seed=config.seed,
            limit=config.limit,
            batch_size=config.batch_size,
            window_slots=config.window_slots,
            plain=config.plain,
            chat_template_kwargs=variables,
            allow_code=config.allow_code,
            output=folder,
            progress=lambda line: print(line, file=sys.stderr),
        )
        setting = {} if folder == config.output else {"setting": folder.name}
        rows += [{**setting, **dataclasses.asdict(result)} for result in results]
        _write(config.output / "results.json", rows)
        print(table(results, folder.name if setting else ""), flush=True)
    return 0


def _sweep(config: EvaluateConfig) -> Iterator[tuple[DecodingFlags, Path]]:
    """Each setting to evaluate, and the folder of its answers: the output itself where there is one setting."""
    thresholds = numbers("thresholds", config.thresholds, float)
    sizes = numbers("block_sizes", config.block_sizes, int)
    for size, threshold in itertools.product(sizes or [None], thresholds or [None]):
        changes, names = {}, []
        if size is not None:
            changes["block_size"] = size
            names.append(f"block{size}")
        if threshold is not None:
            changes["confidence_threshold"] = threshold
            names.append(f"threshold{threshold:g}")
        folder = config.output / "-".join(names) if names else config.output
        yield dataclasses.replace(config.decoding, **changes), folder


def numbers(name: str, text: str | None, kind: type) -> list[Any]:
    """Comma-separated numbers of an option, none if it is not given. Raises ConfigError for anything else."""
    try:
        numbers = [kind(part) for part in (text or "").split(",") if part.strip()]
    except ValueError:
        raise ConfigError(f"{name} is {text!r}, no list of numbers; write it as 0.8,0.9") from None
    if text is not None and (not numbers or len(set(numbers)) < len(numbers)):
        raise ConfigError(f"{name} is {text!r}; give different numbers, at least one")
    return numbers


def _check_folder(
    config: EvaluateConfig, decoding: DecodingFlags, folder: Path, model: Path
) -> None:
    """Raises DataError where a folder has answers of another model or other settings; else notes whose they are."""
    made_by = (config.model, fingerprint(model), _settings(config, decoding))
    answers = folder / "answers"
    check_settings(answers, len(list(folder.glob("*.jsonl"))), *made_by)
    if not settings_file(answers).exists():
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"output {folder}: {error.strerror}; choose another") from None
        write_settings(answers, *made_by)


def _settings(config: EvaluateConfig, decoding: DecodingFlags) -> dict[str, Any]:
    """What the answers depend on, where it is not at its default."""
    values = lambda of, how: {
        **{f.name: getattr(of, f.name) for f in dataclasses.fields(of) if f.name not in _FREE},
        **dataclasses.asdict(how),
        "adapter": of.adapter and fingerprint(of.adapter),
    }
    default = values(EvaluateConfig("", "", Path()), DecodingFlags())
    given = values(config, decoding)
    changed = {name: value for name, value in given.items() if value != default[name]}
    return json.loads(json.dumps(changed))


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    temporary = path.with_name(f".{path.name}.new")
    temporary.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, path)


def table(results: Sequence[Result], setting: str = "") -> str:
    """Scores as lines, in percent: with their 95% interval, and what the answers cost."""
    head = (
        "task",
        "problems",
        "score",
        "95% interval",
        "TPF",
        "forwards",
        "tokens/s",
        "cut off",
        "no answer",
    )
    rows: list[tuple[str, ...]] = [head]
    for r in results:
        speed = f"{r.tokens_per_second:,.0f}" if r.tokens_per_second else "kept"
        rows.append(
            (
                f"{setting} {r.task}".strip(),
                f"{r.problems:,}" + (f" x {r.samples}" if r.samples > 1 else ""),
                f"{100 * r.score:.1f}",
                f"{100 * r.low:.1f} to {100 * r.high:.1f}",
                f"{r.tokens_per_forward:.2f}",
                f"{r.denoising_forwards:,}",
                speed,
                f"{r.cut:,}",
                f"{r.unanswered:,}",
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    for r in results:
        if r.other_scores:
            others = (
                f"{name.replace('_', ' ')} {100 * value:.1f}"
                for name, value in r.other_scores.items()
            )
            lines.append(f"{r.task}: {', '.join(others)}")
        if r.samples > 1:
            passes = ", ".join(f"pass@{k} {100 * value:.1f}" for k, value in r.pass_at.items())
            votes = f"majority {100 * (r.majority or 0):.1f}, by confidence {100 * (r.confidence_vote or 0):.1f}"
            lines.append(f"{r.task}: {passes}, {votes}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
