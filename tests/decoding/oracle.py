"""The decoder as semantics say it, one prompt at a time in plain Python: no cache, no batch.

Every step runs the whole sequence through `sdar_jax.logits`, block-causally; policies are written again, over lists.
"""

import math

import jax
import numpy as np

import sdar_jax
from sdar_jax.decoding.config import DecodingConfig

# One shape, so that one compilation serves every call; what is past the sequence is padding.
LENGTH = 64
_logits = jax.jit(sdar_jax.logits, static_argnames="block_size")


def forward(model, tokens: list[int], block_size: int | None) -> np.ndarray:
    """Logits [length, V] of one sequence, the mask token banned."""
    padded = np.zeros((1, LENGTH), np.int32)
    padded[0, : len(tokens)] = tokens
    segment_ids = (np.arange(LENGTH) < len(tokens)).astype(np.int32)[None]
    logits = np.array(
        _logits(model, padded, block_size=block_size, segment_ids=segment_ids)[0, : len(tokens)]
    )
    if model.config.mask_token_id is not None:
        logits[:, model.config.mask_token_id] = -np.inf
    return logits


def softmax(logits: np.ndarray) -> np.ndarray:
    exp = np.exp(logits - logits.max(-1, keepdims=True))
    return exp / exp.sum(-1, keepdims=True)


def n_k(size: int, steps: int | None, schedule: str, step: int) -> int:
    steps = steps or size
    step = min(step, steps - 1)
    if schedule == "paper":
        return math.ceil(size / steps)
    return size // steps + (1 if step < size % steps else 0)


def without(config: DecodingConfig, logits: np.ndarray, place: int, stops) -> np.ndarray:
    """Logits [V] of one position, the so-manieth of the output, without what may not be proposed there."""
    out = logits.copy()
    out[[*config.suppress_token_ids, *(stops if place < config.min_new_tokens else ())]] = -np.inf
    return out


def choose(
    config: DecodingConfig, probs: np.ndarray, masked: list[int], step: int, size: int, stops=()
) -> list[int]:
    """Window offsets to commit, greedy: `probs` [S, V], `masked` offsets in ascending order."""
    wanted = n_k(size, config.denoising_steps, config.schedule, step)
    score, entropy = scores(config, probs)
    if config.eos_last:
        score = np.where(np.isin(probs.argmax(-1), stops), -np.inf, score)
    return pick(config, score, entropy, masked, wanted)


def scores(config: DecodingConfig, probs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What ranks the positions, and their entropy, of `probs` [S, V]."""
    top = np.sort(probs, axis=-1)
    entropy = -np.sum(
        np.where(probs > 0, probs * np.log(np.where(probs > 0, probs, 1)), 0), axis=-1
    )
    of_name = {
        "probability": top[:, -1],
        "margin": top[:, -1] - top[:, -2],
        "neg_entropy": -entropy,
    }
    return of_name[config.score], entropy


def pick(config: DecodingConfig, score, entropy, masked: list[int], wanted: int) -> list[int]:
    """What a strategy commits of the masked offsets, given each one's score and entropy and n_k."""
    wanted = min(wanted, len(masked))
    best = sorted(masked, key=lambda i: (-score[i], i))
    if config.strategy == "sequential":
        return masked[:wanted]
    if config.strategy in ("low_confidence_static", "semi_autoregressive"):
        return best[:wanted]
    # Without a name, as for the block-diffusion models that these tests decode.
    if config.strategy in (None, "low_confidence_dynamic"):
        sure = [i for i in masked if score[i] > config.confidence_threshold]
        return sure if len(sure) >= wanted else best[:wanted]
    if config.strategy == "factor":
        passing = [n for n, i in enumerate(best, 1) if score[i] >= 1 - config.factor / (n + 1)]
        return best[: max(passing, default=1)]
    if config.strategy == "sub_blocks":
        if masked[0] == 0:
            return [0]
        first = masked[0] // config.sub_block_size
        turn = [i for i in best if i // config.sub_block_size == first]
        return [i for i in turn if i == turn[0] or score[i] > config.confidence_threshold]
    taken, total = [], 0.0
    for i in sorted(masked, key=lambda i: (score[i] == -math.inf, entropy[i], i)):
        after = total + entropy[i]
        within = (
            total <= config.entropy_bound
            if config.entropy_rule == "eb_sampler"
            else after < config.entropy_bound
        )
        if taken and not within:
            break
        taken.append(i)
        total = after
    return taken


def decode(
    model, prompt: list[int], config: DecodingConfig, max_new_tokens: int, stops: tuple[int, ...]
):
    """Greedy (tokens, logprobs, steps, reason, denoising forwards, commit forwards) of one prompt."""
    if config.strategy == "autoregressive":
        return _decode_autoregressive(model, prompt, config, max_new_tokens, stops)
    size = config.block_size or model.config.block_size
    semi = config.strategy == "semi_autoregressive"
    origin = len(prompt) if semi and model.config.block_origin == "response" else 0
    limit = len(prompt) + max_new_tokens
    canvas = origin + math.ceil((limit - origin) / size) * size
    sequence = list(prompt) + [model.config.mask_token_id] * (canvas - len(prompt))
    known = [True] * len(prompt) + [False] * (canvas - len(prompt))
    record = {}
    start = origin + (len(prompt) - origin) // size * size
    denoising, commits = 0, 0
    while max_new_tokens:
        step = 0
        while not all(known[start : start + size]):
            read = sequence if semi else sequence[: start + size]
            logits = forward(model, read, None if semi else size)[start : start + size]
            raw, place = softmax(logits), start - len(prompt)
            probs = softmax(
                np.stack([without(config, row, place + i, stops) for i, row in enumerate(logits)])
            )
            masked = [i for i in range(size) if not known[start + i]]
            for i in choose(config, probs, masked, step, size, stops):
                token = int(probs[i].argmax())
                sequence[start + i], known[start + i] = token, True
                record[start + i] = (token, math.log(raw[i, token]), denoising)
            step, denoising = step + 1, denoising + 1
            end, reason = _ended(sequence, known, len(prompt), start, size, limit, stops)
            if reason:
                out = [record[i] for i in range(len(prompt), end)]
                return *_columns(out), reason, denoising, 0 if semi else commits
        start, commits = start + size, commits + 1
    return [], [], [], "length", 0, 0


def infill(model, canvas: list[int], config: DecodingConfig, stops: tuple[int, ...] = ()):
    """Greedy (tokens, logprobs, steps, reason, denoising forwards) of one canvas; given tokens have 0 and -1.

    What follows the canvas is masks to the end of its last block, as in `decode`; where its last token is given they
    are never filled, and a reader of the whole canvas does not see them.
    """
    mask, semi = model.config.mask_token_id, config.strategy == "semi_autoregressive"
    size, length = config.block_size or model.config.block_size, len(canvas)
    last = max((i for i in range(length) if canvas[i] != mask), default=-1)
    first = next((i for i in range(length) if canvas[i] == mask), length)
    origin = first if semi and model.config.block_origin == "response" else 0
    end = origin + math.ceil((length - origin) / size) * size
    closed = last == length - 1
    sequence = list(canvas) + [mask] * (end - length)
    known = [token != mask for token in canvas] + [closed] * (end - length)
    logprobs, steps, forwards = [0.0] * length, [-1] * length, 0
    for start in range(origin, end, size):
        step = 0
        while not all(known[start : start + size]):
            read = sequence[: length if closed else end] if semi else sequence[: start + size]
            probs = softmax(forward(model, read, None if semi else size)[start : start + size])
            masked = [i for i in range(size) if not known[start + i]]
            for i in choose(config, probs, masked, step, size):
                sequence[start + i], known[start + i] = int(probs[i].argmax()), True
                if start + i < length:
                    logprobs[start + i], steps[start + i] = math.log(probs[i].max()), forwards
            step, forwards = step + 1, forwards + 1
            for i in range(last + 1, length):
                if all(known[: i + 1]) and sequence[i] in stops:
                    return sequence[:i], logprobs[:i], steps[:i], "stop", forwards
            if all(known[:length]):
                break
    return sequence[:length], logprobs, steps, "length", forwards


def decode_window(
    model,
    prompt: list[int],
    config: DecodingConfig,
    max_new_tokens: int,
    stops,
    slots: int,
    *,
    origin: int = 0,
    read=None,
):
    """As `decode`, with up to `slots` blocks at once, by D2F's rule; the whole sequence is read each time.

    Args:
        origin: where blocks are counted from.
        read: sequence -> the logits that predict each of its positions, the mask token banned; None: in place,
            block-causally from its first token.
    """
    size = config.block_size or model.config.block_size
    read = read or (lambda sequence: forward(model, sequence, size))
    limit = len(prompt) + max_new_tokens
    length = origin + (math.ceil((limit - origin) / size) + slots) * size
    sequence = list(prompt) + [model.config.mask_token_id] * (length - len(prompt))
    known = [i < len(prompt) for i in range(length)]
    start, steps, record = origin + (len(prompt) - origin) // size * size, [], {}
    denoising, commits = 0, 0
    while True:
        blocks = [range(start + j * size, start + (j + 1) * size) for j in range(slots + 1)]
        share = [sum(known[i] for i in block) / size for block in blocks]
        window = range(start, start + len(steps) * size)
        stopped = any(
            known[i] and len(prompt) <= i < limit and sequence[i] in stops for i in window
        )
        # Before the first forward the prompt's tail is a block that another may follow.
        for _ in range(1 if denoising + commits else 2):
            follows = not steps or share[len(steps) - 1] >= config.add_threshold and not stopped
            if len(steps) < slots and follows and start + len(steps) * size < limit:
                steps.append(0)
        complete = [share[j] == 1 for j in range(len(steps))]
        probs = softmax(read(sequence[: start + len(steps) * size]))
        for j, block in enumerate(blocks[: len(steps)]):
            masked = [i for i in range(size) if not known[block[i]]]
            best = probs[block.start : block.stop]
            activated = j == 0 or share[j - 1] >= config.activate_threshold
            chosen = choose(config, best, masked, steps[j], size) if masked and activated else []
            if not activated:
                score, _ = scores(config, best)
                chosen = [i for i in masked if score[i] > config.confidence_threshold]
            for i in chosen:
                token = int(best[i].argmax())
                sequence[block[i]], known[block[i]] = token, True
                record[block[i]] = (token, math.log(best[i].max()), denoising)
            steps[j] += bool(masked) and activated
        commits += all(complete)
        denoising += not all(complete)
        end, reason = _ended(sequence, known, len(prompt), start, len(steps) * size, limit, stops)
        if reason:
            return (
                *_columns([record[i] for i in range(len(prompt), end)]),
                reason,
                denoising,
                commits,
            )
        while complete and complete[0]:
            complete, steps, start = complete[1:], steps[1:], start + size


def _ended(sequence, known, prompt_length, start, size, limit, stops):
    for i in range(start, start + size):
        if not known[i]:
            return None, None
        if i >= prompt_length and i < limit and sequence[i] in stops:
            return i, "stop"
        if i + 1 >= limit:
            return limit, "length"
    return None, None


def _decode_autoregressive(model, prompt, config, max_new_tokens, stops):
    sequence, out = list(prompt), []
    for step in range(max_new_tokens):
        logits = forward(model, sequence, 1)[-1]
        probs, token = softmax(logits), int(without(config, logits, step, stops).argmax())
        if token in stops:
            return *_columns(out), "stop", step + 1, 0
        out.append((token, math.log(probs[token]), step))
        sequence.append(token)
    return *_columns(out), "length", max_new_tokens, 0


def alternatives(model, prompt: list[int], completion, config: DecodingConfig):
    """The likeliest tokens of each position, with their log-probabilities, in the state before it was committed."""
    if config.strategy == "autoregressive":
        rows = forward(model, prompt + completion.tokens, 1)[len(prompt) - 1 : -1]
        return [_likeliest(softmax(row), config.top_logprobs) for row in rows]
    size, mask = config.block_size or model.config.block_size, model.config.mask_token_id
    out = []
    for i, step in enumerate(completion.steps):
        end = ((len(prompt) + i) // size + 1) * size
        if config.strategy == "semi_autoregressive":
            end = len(prompt) + len(completion.tokens)
        known = zip(completion.tokens, completion.steps, strict=True)
        sequence = prompt + [token if own < step else mask for token, own in known]
        sequence = (sequence + [mask] * end)[:end]
        seen = None if config.strategy == "semi_autoregressive" else size
        probs = softmax(forward(model, sequence, seen)[len(prompt) + i])
        out.append(_likeliest(probs, config.top_logprobs))
    return out


def _likeliest(probs: np.ndarray, count: int) -> list[tuple[int, float]]:
    order = sorted(range(len(probs)), key=lambda token: -probs[token])[:count]
    return [(token, math.log(probs[token])) for token in order if probs[token] > 0]


def _columns(out):
    return tuple(map(list, zip(*out, strict=True))) if out else ([], [], [])
