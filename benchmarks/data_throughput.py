"""How fast rows of tokens come: tokenised as they are read, and read from `data.token_cache`.

    python -m benchmarks.data_throughput [--megabytes 40] [--rows 2000]

Texts are Python's own library, the tokenizer a BPE of 32,000 learned from it; rows of 4,096 tokens.
"""

import argparse
import dataclasses
import json
import sysconfig
import tempfile
import time
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from sdar_jax.data import DataConfig, SourceConfig, make_dataset

LENGTH, BATCH = 4096, 8


def texts(megabytes: int) -> list[str]:
    """Pieces of the library's files, of 2,000 characters, as many as asked for."""
    found, size = [], 0
    while size < megabytes * 1e6:
        for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
            text = path.read_text(encoding="utf-8", errors="ignore")
            found += [
                text[i : i + 2000] for i in range(0, len(text), 2000) if text[i : i + 2000].strip()
            ]
            size += len(text)
            if size >= megabytes * 1e6:
                break
    return found


def tokenizer(corpus: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of 32,000."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=32000, special_tokens=["<|endoftext|>"], show_progress=False
    )
    raw.train_from_iterator(corpus[:4000], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|endoftext|>")


def speed(config: DataConfig, words: PreTrainedTokenizerFast, rows: int) -> tuple[float, float]:
    """Seconds to the first batch, and tokens a second from there."""
    started = time.perf_counter()
    data = make_dataset(config, words, block_size=4, eos_token_id=0)
    next(data)
    first = time.perf_counter() - started
    started = time.perf_counter()
    for _ in range(rows // BATCH):
        next(data)
    seconds = time.perf_counter() - started
    data.close()
    return first, rows // BATCH * BATCH * LENGTH / seconds


def main() -> None:
    """Prints tokens a second with and without the cache."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=40)
    parser.add_argument("--rows", type=int, default=1000)
    args = parser.parse_args()
    corpus = texts(args.megabytes)
    words = tokenizer(corpus)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "texts.jsonl"
        path.write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in corpus), encoding="utf-8"
        )
        for packing in ("split", "fit"):
            plain = DataConfig((SourceConfig(str(path), "jsonl"),), LENGTH, BATCH, packing=packing)
            kept = dataclasses.replace(plain, token_cache=str(Path(folder) / "cache"))
            _, before = speed(plain, words, args.rows)
            made, _ = speed(kept, words, BATCH)
            start, after = speed(kept, words, args.rows)
            print(
                f"{packing}: {before / 1e6:.2f}M tokens/s as read; cache made in {made:.1f} s, opened in {start:.2f} s,"
                f" then {after / 1e6:.2f}M tokens/s, {after / before:.1f}x",
                flush=True,
            )


if __name__ == "__main__":
    main()
