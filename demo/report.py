"""What the demo shows: a table, a picture, and answers as they form."""

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from demo.evaluate import MAX_NEW_TOKENS, Problem, Result
from sdar_jax import Completion, DecodingConfig, generate
from sdar_jax.model import Model

_HEADER = (
    "model",
    "S",
    "decoding",
    "tau",
    "accuracy",
    "tokens/fwd",
    "forwards",
    "commits",
    "tokens/s",
    "alone",
)


def table(results: Sequence[Result]) -> str:
    """One row a way of decoding; forwards and commits are means a problem, "alone" tokens a second at batch 1."""
    rows = [_HEADER, *map(_cells, results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(_HEADER))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def _cells(result: Result) -> tuple[str, ...]:
    return (
        result.model,
        str(result.block_size or "-"),
        result.strategy,
        "-" if result.threshold is None else f"{result.threshold:.2f}",
        f"{result.accuracy:.3f} ± {result.standard_error:.3f}",
        f"{result.tokens_per_forward:.2f}",
        f"{result.denoising_forwards:.1f}",
        f"{result.commit_forwards:.1f}",
        f"{result.tokens_per_second:.0f}" if result.tokens_per_second else "-",
        f"{result.tokens_per_second_alone:.0f}",
    )


def forming(model: Model, tokenizer: PreTrainedTokenizerBase, problems: Sequence[Problem]) -> str:
    """The answers to a few problems, a line for each denoising forward."""
    prompts = [problem["prompt"] for problem in problems]
    config = DecodingConfig(confidence_threshold=0.9)
    done = generate(model, prompts, config, max_new_tokens=MAX_NEW_TOKENS, tokenizer=tokenizer)
    title = f"S = {model.config.block_size}, tau = {config.confidence_threshold}"
    shown = [
        f"{title}: {prompt}\n{_steps(c, tokenizer)}"
        for prompt, c in zip(prompts, done, strict=True)
    ]
    return "\n".join(shown)


def _steps(completion: Completion, tokenizer: PreTrainedTokenizerBase) -> str:
    pieces = [str(tokenizer.decode([token])) for token in completion.tokens]
    lines = []
    for step in range(completion.denoising_forwards):
        known = (
            piece if at <= step else "·" for piece, at in zip(pieces, completion.steps, strict=True)
        )
        lines.append(f"  {step + 1:3d}  {''.join(known)}")
    return "\n".join(lines) + "\n"


def plot(results: Sequence[Result], path: Path) -> None:
    """Accuracy against tokens per forward, with standard errors; the baseline as a line across."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    baseline = next(r for r in results if r.block_size is None)
    axes.axhline(baseline.accuracy, color="black", linewidth=1)
    axes.errorbar(
        baseline.tokens_per_forward,
        baseline.accuracy,
        baseline.standard_error,
        fmt="ks",
        label="AR greedy",
    )
    for color, size in zip(
        ("tab:blue", "tab:orange"),
        sorted({r.block_size for r in results if r.block_size}),
        strict=False,
    ):
        for strategy, style in (("static", "D"), ("dynamic", "o-")):
            chosen = [r for r in results if r.block_size == size and r.strategy == strategy]
            x, y = [r.tokens_per_forward for r in chosen], [r.accuracy for r in chosen]
            errors = [r.standard_error for r in chosen]
            axes.errorbar(
                x, y, errors, fmt=style, color=color, capsize=3, label=f"S = {size}, {strategy}"
            )
    axes.set(xlabel="generated tokens a denoising forward", ylabel="accuracy (± standard error)")
    axes.legend()
    figure.savefig(path, dpi=150)
    plt.close(figure)
