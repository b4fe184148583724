"""The demo's problems against reasoning-gym's verifiers, their split into training and held-out, their tokenizer."""

import itertools
import json
import string
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from sdar_jax.errors import ConfigError, DataError

pytest.importorskip(
    "reasoning_gym", reason="the demo's tasks need reasoning-gym (pip install 'sdar-jax[demo]')"
)

from demo.tasks import TASKS, build, score
from demo.tokenizer import CHARACTERS, VOCAB_SIZE, make_tokenizer

every_task = pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))


def some(task, n=100, seed=3):
    return list(itertools.islice(task.items(seed), n))


def another(character: str) -> str:
    """Far enough off: number_sorting's verifier lets a number be wrong by one."""
    if character.isdigit():
        return str((int(character) + 5) % 10)
    return "A" if character != "A" else "B"


def records_of(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize(
    ("name", "item", "prompt", "answer"),
    [
        (
            "spiral_matrix",
            {"answer": "1 2 4 3", "metadata": {"matrix": [[1, 2], [3, 4]]}},
            "spiral_matrix 12 34=",
            "1243",
        ),
        (
            "rotate_matrix",
            {"answer": "3 1\n4 2", "metadata": {"matrix": [[1, 2], [3, 4]], "num_rotations": 1}},
            "rotate_matrix 90 12 34=",
            "3142",
        ),
        (
            "number_sorting",
            {
                "answer": "['1.0', '10.0']",
                "metadata": {
                    "direction": "ascending",
                    "original_numbers": ["10.0", "1.0"],
                    "sorted_numbers": ["1.0", "10.0"],
                },
            },
            "number_sorting < 10 1=",
            "1 10",
        ),
        (
            "mini_sudoku",
            {"answer": "1 2\n3 4", "metadata": {"puzzle": [[1, 0], [0, 4]]}},
            "mini_sudoku 1_ _4=",
            "1234",
        ),
    ],
)
def test_compact_form_written_out_by_hand(name, item, prompt, answer):
    assert TASKS[name].prompt(item) == prompt
    assert TASKS[name].answer(item) == answer


@every_task
def test_the_verifier_accepts_the_answer_and_no_other(task):
    for item in some(task, 20):
        answer = task.answer(item)
        assert task.score(answer, item) == 1.0
        assert task.score(answer[:-1], item) < 1.0
        assert task.score(answer + "7", item) < 1.0
        for k, character in enumerate(answer):
            assert task.score(answer[:k] + another(character) + answer[k + 1 :], item) < 1.0


@every_task
@pytest.mark.parametrize(
    "answer", ["", " ", "=", "()", "[", "é", "²", "0" * 500, "None", "\n\n", "1 2 3", "ABCDE"]
)
def test_a_malformed_answer_is_wrong_and_raises_nothing(task, answer):
    assert task.score(answer, some(task, 1)[0]) < 1.0


@every_task
def test_no_answer_is_evaluated_as_code(task, tmp_path):
    target = tmp_path / "written"
    task.score(f"open({str(target)!r}, 'w')", some(task, 1)[0])
    assert not target.exists()


@every_task
def test_answers_are_long_enough_for_parallel_decoding_to_matter(task):
    lengths = [len(task.answer(item)) for item in some(task, 500)]
    assert sum(lengths) / len(lengths) >= 16


@every_task
def test_prompts_are_distinct_and_differ_between_seeds(task):
    first, second = ({task.prompt(item) for item in some(task, 300, seed)} for seed in (0, 1))
    assert len(first) > 290
    assert len(first & second) < 10


@every_task
def test_prompts_and_answers_hold_no_unknown_token_and_come_back(task, tokenizer):
    for item in some(task):
        for text in (task.prompt(item), task.answer(item)):
            ids = tokenizer.encode(text)
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text


@every_task
def test_a_prompt_takes_one_token_a_character_and_one_for_the_name(task, tokenizer):
    prompt = task.prompt(some(task, 1)[0])
    assert len(tokenizer.encode(prompt)) == 1 + len(prompt) - len(task.name)
    assert len(tokenizer.encode(task.name + "=")) == len(task.name) + 1


def test_build_writes_the_numbers_asked_for_and_holds_prompts_out(tmp_path):
    train, test = (records_of(path) for path in build(list(TASKS), 203, 50, 0, tmp_path))
    assert (len(train), len(test)) == (203, 50)
    for records, total in ((train, 203), (test, 50)):
        counts = [sum(record["task"] == name for record in records) for name in TASKS]
        assert sum(counts) == total
        assert max(counts) - min(counts) <= 1
    prompts = [record["prompt"] for record in train + test]
    assert len(set(prompts)) == len(prompts)
    assert set(train[0]) == {"prompt", "response", "task"}
    assert len({record["task"] for record in train[:20]}) > 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test.jsonl", "train.jsonl"]


def test_build_repeats_itself_and_keeps_its_held_out_problems(tmp_path):
    names = ["spiral_matrix", "number_sorting"]
    first, again, longer, other = (
        build(names, n, 20, seed, tmp_path / str(k))
        for k, (n, seed) in enumerate([(40, 5), (40, 5), (90, 5), (40, 6)])
    )
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in again]
    assert first[1].read_bytes() == longer[1].read_bytes()
    held_out, others = (
        {record["prompt"] for record in records_of(paths[1])} for paths in (first, other)
    )
    assert not held_out & others


def test_scores_of_records_read_back_from_the_file(tmp_path):
    records = records_of(build(list(TASKS), 6, 24, 1, tmp_path)[1])
    answers = [record["response"] for record in records]
    assert score(records, answers) == [1.0] * 24
    shifted = score(records, answers[1:] + answers[:1])
    assert sum(reward == 1.0 for reward in shifted) == 0


def test_an_unknown_task_is_refused(tmp_path):
    with pytest.raises(ConfigError, match="'sudoku' is unknown; choose from spiral_matrix"):
        build(["spiral_matrix", "sudoku"], 10, 10, 0, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.fixture
def fifteen_prompts(monkeypatch):
    """binary_matrix made so small that its items repeat themselves."""
    monkeypatch.setitem(
        TASKS, "binary_matrix", replace(TASKS["binary_matrix"], options={"min_n": 2, "max_n": 2})
    )


@pytest.mark.usefixtures("fifteen_prompts")
def test_a_repeated_prompt_is_left_out(tmp_path):
    train, test = (records_of(path) for path in build(["binary_matrix"], 6, 4, 0, tmp_path))
    assert (len(train), len(test)) == (6, 4)
    assert len({record["prompt"] for record in train + test}) == 10


@pytest.mark.usefixtures("fifteen_prompts")
def test_a_task_with_too_few_prompts_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(
        DataError, match=r"binary_matrix gave only \d+ distinct prompts of 50 wanted"
    ):
        build(["binary_matrix"], 40, 10, 0, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_answers_and_records_must_pair_up():
    with pytest.raises(DataError, match="2 answers to 0 records"):
        score([], ["1", "2"])


def test_the_tokenizer_is_a_hugging_face_directory_with_spare_rows(tmp_path):
    tokenizer = make_tokenizer(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    assert {"tokenizer.json", "tokenizer_config.json"} <= {path.name for path in tmp_path.iterdir()}
    assert loaded.get_vocab() == tokenizer.get_vocab()
    assert sorted(loaded.get_vocab().values()) == list(range(len(loaded)))
    assert len(loaded) < VOCAB_SIZE
    assert (loaded.eos_token, loaded.pad_token, loaded.bos_token) == (
        "<|im_end|>",
        "<|endoftext|>",
        None,
    )
    assert loaded.encode("é") == [loaded.unk_token_id]


def test_the_chat_template_is_chatml(tmp_path):
    make_tokenizer(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    turns = [{"role": "user", "content": "1+1="}, {"role": "assistant", "content": "2"}]
    text = "<|im_start|>user\n1+1=<|im_end|>\n<|im_start|>assistant\n"
    assert (
        tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True) == text
    )
    assert tokenizer.apply_chat_template(turns, tokenize=False) == text + "2<|im_end|>\n"
    assert tokenizer.tokenize(text) == [
        *("<|im_start|>", "user", "\n", "1", "+", "1", "=", "<|im_end|>", "\n"),
        *("<|im_start|>", "assistant", "\n"),
    ]


@given(text=st.text(CHARACTERS, max_size=60))
def test_any_printable_text_comes_back(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert set(CHARACTERS) == set(string.printable) - set("\t\r\x0b\x0c")
