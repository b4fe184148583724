"""Run with lm-evaluation-harness installed: `python harness_checks.py DIRECTORY`. Makes a model there and checks it.

Likelihoods against the chain rule term by term, answers against `generate`, and a whole run of the harness.
"""

import json
import sys
from pathlib import Path

import jax.numpy as jnp
import lm_eval
import numpy as np
from lm_eval.api.instance import Instance

from sdar_jax import generate, logits, save_pretrained
from sdar_jax.errors import ConfigError
from sdar_jax.evaluation.harness import HarnessModel
from tests.data.conftest import make_byte_tokenizer
from tests.tiny import tiny_model

PAIRS = [
    ("what is", " it?"),
    ("", "no context"),
    ("a", "b"),
    ("some longer context to read", " and its end"),
]
TEXTS = ["once upon a time", "b"]


def instances(kind, arguments):
    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


def make(directory, name, **changes):
    model = tiny_model(jnp.float32, vocab_size=320, **({"mask_token_id": 300} | changes))
    save_pretrained(model, directory / name)
    make_byte_tokenizer().save_pretrained(directory / name)
    return str(directory / name)


def log_softmax(x):
    return x - np.log(np.exp(x - x.max()).sum()) - x.max()


def chain_rule(model, ids, first, predict):
    """log p of ids from `first` on, and whether each is the likeliest."""
    terms = [log_softmax(predict(ids[:i])) for i in range(first, len(ids))]
    return sum(term[token] for term, token in zip(terms, ids[first:], strict=True))


def check_likelihoods(directory):
    block = HarnessModel(make(directory, "block"), likelihood_block_size=1)
    one = HarnessModel(
        make(directory, "ar", objective="autoregressive", block_size=None, mask_token_id=None)
    )

    def masked(ids):
        return np.array(
            logits(block.model, np.array([[*ids, 300]]), block_size=1)[0, -1], np.float64
        )

    def next_token(ids):
        return np.array(logits(one.model, np.array([ids]), block_size=1)[0, -1], np.float64)

    for model, predict in ((block, masked), (one, next_token)):
        scores = model.loglikelihood(instances("loglikelihood", PAIRS))
        for (context, rest), (score, greedy) in zip(PAIRS, scores, strict=True):
            before = model.tok_encode(context) or [model.eot_token_id]
            ids = [*before, *model.tok_encode(rest)]
            expected = chain_rule(model.model, ids, len(before), predict)
            assert abs(score - expected) < 1e-3 * len(rest), (context, score, expected)
            (completion,) = generate(
                model.model, [before], max_new_tokens=len(ids) - len(before), stop_token_ids=()
            )
            assert greedy == (completion.tokens == ids[len(before) :])
        rolling = model.loglikelihood_rolling(
            instances("loglikelihood_rolling", [(t,) for t in TEXTS])
        )
        pairs = [("", text) for text in TEXTS]
        alone = model.loglikelihood(instances("loglikelihood", pairs))
        assert np.allclose(rolling, [score for score, _ in alone], atol=1e-3)


def check_bound(directory):
    """The bound is below the exact value's neighbourhood, the same each time, whatever else is asked."""
    model = HarnessModel(str(directory / "block"), samples=64)
    first = model.loglikelihood(instances("loglikelihood", PAIRS))
    assert first[::-1] == model.loglikelihood(instances("loglikelihood", PAIRS[::-1]))


def check_batches(directory):
    """Together as one by one: the bound with its masks, texts in windows, and an AR model's."""
    pairs = [*PAIRS, ("x" * 90, "y" * 30), ("z" * 5, "w" * 140)]
    for name, options in (("block", {"samples": 8}), ("ar", {})):
        path = str(directory / name)
        together, alone = (HarnessModel(path, batch_size=size, **options) for size in (4, 1))
        for kind, arguments in (
            ("loglikelihood", pairs),
            ("loglikelihood_rolling", [(text,) for _, text in pairs]),
        ):
            found = getattr(together, kind)(instances(kind, arguments))
            expected = [getattr(alone, kind)(instances(kind, [each]))[0] for each in arguments]
            assert np.allclose(found, expected, rtol=1e-5), (name, kind, found, expected)


def check_answers(directory):
    options = {"until": ["q", "Z"], "max_gen_toks": 12, "do_sample": False}
    asked = instances("generate_until", [(context or "x", options) for context, _ in PAIRS])
    answers = [
        HarnessModel(str(directory / name), batch_size=size).generate_until(asked)
        for name in ("block", "ar")
        for size in (1, 3)
    ]
    assert answers[0] == answers[1] and answers[2] == answers[3]
    model = HarnessModel(str(directory / "block"))
    expected = generate(
        model.model,
        [model.tok_encode(each.args[0]) for each in asked],
        max_new_tokens=12,
        stop_strings=("q", "Z"),
        tokenizer=model.tokenizer,
    )
    assert answers[0] == [completion.text for completion in expected]
    text = model.apply_chat_template([{"role": "user", "content": "hi"}])
    assert text == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def check_run(directory):
    records = [
        {"q": f"what is {i}?", "a": str(i), "choices": [" yes", " no"], "gold": i % 2}
        for i in range(4)
    ]
    (directory / "data.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    files = {"test": str(directory / "data.jsonl")}
    base = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "test_split": "test",
        "doc_to_text": "{{q}}",
    }
    tasks = [
        {
            **base,
            "task": "answers",
            "output_type": "generate_until",
            "doc_to_target": "{{a}}",
            "generation_kwargs": {"until": ["\n"], "max_gen_toks": 8, "do_sample": False},
            "metric_list": [{"metric": "exact_match"}],
        },
        {
            **base,
            "task": "choices",
            "output_type": "multiple_choice",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "gold",
            "metric_list": [{"metric": "acc"}],
        },
    ]
    scores = []
    for size in (1, 3):
        model = HarnessModel(str(directory / "block"), batch_size=size)
        found = lm_eval.simple_evaluate(
            model=model, tasks=tasks, bootstrap_iters=0, apply_chat_template=True
        )
        scores.append({name: result for name, result in found["results"].items()})
    assert str(scores[0]) == str(scores[1]) and set(scores[0]) == {"answers", "choices"}


def check_errors(directory):
    for arguments, told in (
        ({"threshold": 0.9}, "threshold=0.9 is no argument"),
        ({"block_size": 0}, "block_size"),
    ):
        try:
            HarnessModel(str(directory / "block"), **arguments)
        except ConfigError as error:
            assert told in str(error)
        else:
            raise AssertionError(arguments)


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    checks = (check_likelihoods, check_bound, check_batches, check_answers, check_run, check_errors)
    for check in checks:
        check(folder)
        print(check.__name__, "passed", flush=True)
