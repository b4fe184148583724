"""The quickstart's notebook runs from top to bottom, on a model that is tiny."""

import json
from pathlib import Path

import jax
import pytest

from demo.word_problems import for_test, problems
from sdar_jax import ModelConfig, save_pretrained
from sdar_jax.model import Model
from tests.data.conftest import make_byte_tokenizer

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "docs" / "quickstart.ipynb"
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def cells() -> list[dict]:
    return [
        cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"
    ]


def test_problems_are_right():
    """The solution's equations hold and lead to the answer; no question comes twice."""
    drawn = problems(seed=3)
    found = [next(drawn) for _ in range(500)]
    assert len({each.question for each in found}) == 500
    for each in found:
        for equation in each.solution.rstrip(".").split(". "):
            left, right = equation.split(" = ")
            assert eval(left) == int(right) >= 0
        assert right == str(each.answer) and for_test(each)["answer"].endswith(f"#### {right}")
        first, *_ = each.solution.split()
        assert f"has {first} " in each.question


def test_nothing_is_stored_of_a_run():
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in cells())


@pytest.mark.slow
@pytest.mark.ci
def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    tokenizer = make_byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    shape = ModelConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_layers=1,
        num_heads=2,
        num_kv_heads=1,
        head_dim=8,
        eos_token_id=tokenizer.eos_token_id,
        max_position_embeddings=1024,
    )
    save_pretrained(
        Model(shape, jax.random.key(0)), tmp_path / "base", tokenizer_from=tmp_path / "tokenizer"
    )
    monkeypatch.chdir(ROOT)
    names: dict = {}
    for cell in cells():
        exec("".join(cell["source"]), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            names |= {"base": str(tmp_path / "base"), "folder": str(tmp_path / "quickstart")}
            names |= {"steps": 10, "train_problems": 20, "test_problems": 2, "max_new_tokens": 8}
    printed = capsys.readouterr().out
    assert printed.count("tokens a forward") == 3 and "10 loss" in printed
