"""Benchmarks during a run are those of `evaluate`, and the best model is kept, whoever starts the run how often."""

import json
from pathlib import Path

import pytest

import sdar_jax
from sdar_jax import DecodingConfig, load_pretrained, load_tokenizer
from sdar_jax.data import DataConfig, SourceConfig
from sdar_jax.errors import CheckpointError, ConfigError, DataError
from sdar_jax.evaluation import evaluate
from sdar_jax.evaluation.config import EvalConfig
from sdar_jax.model import ModelConfig
from sdar_jax.training import TrainConfig
from sdar_jax.training.best import keep_best
from sdar_jax.training.config import CheckpointConfig, InitConfig, OptimizerConfig
from tests.bad_input import message_of
from tests.data.conftest import make_byte_tokenizer

SHAPE = ModelConfig(
    vocab_size=320,
    hidden_size=16,
    intermediate_size=32,
    num_layers=1,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
)


@pytest.fixture
def run(tmp_path):
    """Makes the config of a run of four steps on questions with one answer, evaluated after each second."""
    make_byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    records = [{"question": f"q{i}", "answer": "so\n#### 1"} for i in range(6)]
    (tmp_path / "gsm8k.json").write_text(json.dumps(records))
    chats = [{"question": f"q{i}", "answer": "\\boxed{1}"} for i in range(6)]
    (tmp_path / "train.json").write_text(json.dumps(chats))
    source = SourceConfig(str(tmp_path / "train.json"), "chat", "answer", "question")

    def make(**evaluation) -> TrainConfig:
        task = f"gsm8k={tmp_path}/gsm8k.json"
        evaluation = {"tasks": (task,), "every": 2, "limit": 3, "max_new_tokens": 8} | evaluation
        return TrainConfig(
            run_dir=str(tmp_path / "run"),
            steps=4,
            model=InitConfig(
                shape=SHAPE,
                tokenizer=str(tmp_path / "tokenizer"),
                objective="block_diffusion",
                block_size=4,
            ),
            data=DataConfig((source,), 64, 2, packing="fit", num_threads=0),
            optimizer=OptimizerConfig(learning_rate=0.01),
            checkpoint=CheckpointConfig(every=2),
            eval=EvalConfig(**evaluation),
            tensorboard=False,
        )

    return make


def lines(config) -> list[dict]:
    path = Path(config.run_dir) / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_scores_are_those_of_evaluate(run, tmp_path):
    config = run(decoding={"confidence_threshold": 0.5})
    model = sdar_jax.train(config)
    found = [line for line in lines(config) if "eval_gsm8k" in line]
    assert [line["step"] for line in found] == [2, 4]
    (expected,) = evaluate(
        model,
        load_tokenizer(tmp_path / "tokenizer"),
        config.eval.tasks,
        DecodingConfig(confidence_threshold=0.5),
        max_new_tokens=8,
        limit=3,
    )
    assert found[-1]["eval_gsm8k"] == expected.score
    assert found[-1]["eval_gsm8k_tpf"] == pytest.approx(expected.tokens_per_forward)


def test_the_best_model_is_that_of_its_step(run, tmp_path):
    config = run(data=run().data, rows=2, samples=2, tasks=(), best="nelbo")
    sdar_jax.train(config)
    found = {line["step"]: line["eval_nelbo"] for line in lines(config) if "eval_nelbo" in line}
    best = json.loads((tmp_path / "run" / "best.json").read_text())
    assert best["value"] == min(found.values()) and found[best["step"]] == best["value"]
    assert load_pretrained(tmp_path / "run" / "best").config.block_size == 4
    assert load_tokenizer(tmp_path / "run" / "best").chat_template


def values(keep, *numbers, name="score"):
    for step, number in enumerate(numbers):
        keep(step, {f"eval_{name}": number}, lambda: None)


def test_better_is_more_or_less_and_is_remembered(tmp_path):
    kept = []
    export = lambda model, path: kept.append(path)
    values(keep_best("score", tmp_path, export), 0.1, 0.3, 0.2, float("nan"), 0.3)
    assert len(kept) == 2 and json.loads((tmp_path / "best.json").read_text())["step"] == 1
    values(keep_best("score", tmp_path, export), 0.2, 0.3)
    assert len(kept) == 2, "an earlier start had better ones"
    values(keep_best("nelbo", tmp_path, export), float("nan"), 2.0, 3.0, 1.0, name="nelbo")
    assert len(kept) == 4, "of another number nothing is known yet"
    values(keep_best("nelbo_position/4-7", tmp_path, export), 2.0, 3.0, name="nelbo_position/4-7")
    assert json.loads((tmp_path / "best.json").read_text())["value"] == 2.0
    keep_best("score", tmp_path, export)(9, {"loss": 1.0}, lambda: None)
    told = message_of(ConfigError, values, keep_best("other", tmp_path, export), 1.0)
    assert "eval.best is 'other', and the evaluation gives score" in told
    (tmp_path / "best.json").write_text("{")
    assert "best.json: cannot be read" in message_of(
        CheckpointError, keep_best, "score", tmp_path, export
    )


@pytest.mark.parametrize(
    ("fields", "told"),
    [
        ({"tasks": ()}, "eval has neither data nor tasks"),
        ({"decoding": {"threshold": 1}}, "decoding has 'threshold', which is no field of it"),
        ({"decoding": {"confidence_threshold": 2.0}}, "confidence_threshold"),
        ({"limit": 0}, "limit"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
    ],
)
def test_fields_that_do_not_fit(run, fields, told):
    with pytest.raises(sdar_jax.errors.SdarError, match=told):
        run(**fields)


def test_what_cannot_be_evaluated_is_said_before_the_first_step(run, tmp_path):
    for fields, kind, told in (
        ({"tasks": ("gsm9k",)}, ConfigError, "task 'gsm9k': choose from"),
        ({"tasks": ("gsm8k=gone.json",)}, DataError, "gone.json: no such file"),
        (
            {"tasks": (f"humaneval={tmp_path}/he.json",)},
            ConfigError,
            "humaneval, which runs programs",
        ),
    ):
        record = {"task_id": "1", "prompt": "p", "test": "t", "entry_point": "f"}
        (tmp_path / "he.json").write_text(json.dumps([record]))
        assert told in message_of(kind, sdar_jax.train, run(**fields))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
