"""Where a model has to stop follows from how its data ends, whatever the chat template."""

import json
import logging
from dataclasses import replace

import pytest

from sdar_jax.data import SourceConfig
from sdar_jax.errors import ConfigError
from sdar_jax.hf.pretrained import load_pretrained
from sdar_jax.model.config import ModelConfig
from sdar_jax.training import TrainConfig, run
from sdar_jax.training.config_io import from_values
from sdar_jax.training.stops import turn_ends, with_learned_stops
from tests.data.conftest import CHATML, SPECIAL, make_byte_tokenizer
from tests.training.conftest import merged, run_values

END, START, TURN, BOS = range(4)
SHAPE = ModelConfig(300, 16, 32, 1, 2, 1, 8, eos_token_id=END)
CHAT, TEXT = SourceConfig("a", "chat"), SourceConfig("b", "jsonl", prompt_field="question")

LAST_ENDS_TEXT = CHATML + "{%- if not add_generation_prompt -%}{{- '<|endoftext|>' -}}{%- endif -%}"
TAGGED = (
    "{%- for m in messages -%}{{- '<|im_start|>' + m.role + '\n' -}}{%- if m.role == 'assistant' -%}"
    "{%- generation -%}{{- m.content -}}{%- endgeneration -%}{%- else -%}{{- m.content -}}{%- endif -%}"
    "{{- '<|im_end|>\n' -}}{%- endfor -%}{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)
THINKING = CHATML.replace(
    "message.content +",
    "('<think>\n\n</think>\n\n' if message.role == 'assistant' and loop.last else '') + message.content +",
)
LLAMA2 = (
    "{%- for m in messages -%}{%- if m.role == 'user' -%}{{- '<s>[INST] ' + m.content + ' [/INST]' -}}"
    "{%- else -%}{{- ' ' + m.content + ' <|endoftext|>' -}}{%- endif -%}{%- endfor -%}"
)
ONE_EXCHANGE = CHATML.replace(
    "{%- for",
    "{%- if messages | length > 2 -%}{{ raise_exception('one question alone') }}{%- endif -%}{%- for",
    1,
)
PLAIN = (
    "{%- for m in messages -%}{{- m.role + ': ' + m.content + '\n\n' -}}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- 'assistant: ' -}}{%- endif -%}"
)
SYSTEM_FIRST = (
    "{%- if messages[0].role != 'system' -%}{{ raise_exception('no system') }}{%- endif -%}"
    + CHATML
)
REFUSING = "{{ raise_exception('not today') }}"
SPELLED = PLAIN.replace("'\n\n'", "'</turn>\n'")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, [TURN]),
        (CHATML.replace("<|im_end|>\n", "<|im_end|>"), [TURN]),
        (LAST_ENDS_TEXT, [TURN]),
        (TAGGED, [TURN]),
        (THINKING, [TURN]),
        (ONE_EXCHANGE, [TURN]),
        (LLAMA2, [END]),
        (PLAIN, []),
        (SPELLED, []),
        (SYSTEM_FIRST, [TURN]),
        (REFUSING, []),
    ],
)
def test_turn_ends_of_a_template(template, expected, caplog):
    assert turn_ends(make_byte_tokenizer(template)) == expected
    assert ("turns end with '</turn>', for which there is no token" in caplog.text) == (
        template == SPELLED
    )
    assert ("where turns end is not known (the chat template refuses" in caplog.text) == (
        template == REFUSING
    )
    assert len(caplog.records) == (template in (SPELLED, REFUSING))


@pytest.mark.parametrize(
    ("sources", "own", "expected"),
    [
        ((CHAT,), (END,), (TURN, END)),
        ((CHAT,), (), (TURN, END)),
        ((CHAT, TEXT), (END, BOS), (TURN, END, BOS)),
        ((CHAT,), (END, TURN), (END, TURN)),
        ((TEXT,), (TURN,), (END, TURN)),
        ((TEXT,), (END, BOS), (END, BOS)),
        ((TEXT,), (), (END,)),
    ],
)
def test_a_model_stops_at_what_it_learned_and_at_its_own(sources, own, expected, caplog):
    with caplog.at_level(logging.INFO, "sdar_jax"):
        found = with_learned_stops(
            replace(SHAPE, stop_token_ids=own), make_byte_tokenizer(), sources
        )
    assert found == replace(SHAPE, stop_token_ids=expected)
    said = ", ".join(f"{SPECIAL[token]} ({token})" for token in expected)
    assert caplog.text.count(f"the exported model will stop at {said}") == (own != expected)


def test_a_run_exports_where_its_conversations_end(inputs, tmp_path):
    make_byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    (tmp_path / "chat.jsonl").write_text((json.dumps({"messages": talk}) + "\n") * 8)
    data = {
        "sources": [{"path": str(tmp_path / "chat.jsonl"), "format": "chat"}],
        "loss": "response",
    }
    changes = {
        "steps": 1,
        "model": {"tokenizer": str(tmp_path / "tokenizer"), "shape": {"vocab_size": 264}},
    }
    values = merged(
        run_values(inputs, tmp_path / "run"), {**changes, "data": {**data, "sequence_length": 64}}
    )
    assert run(from_values(TrainConfig, values)).finished
    saved = json.loads((tmp_path / "run" / "model" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [TURN, END]
    assert load_pretrained(tmp_path / "run" / "model").config.stop_token_ids == (TURN, END)


def test_the_end_of_text_is_the_models_or_the_tokenizers():
    tokenizer = make_byte_tokenizer()
    assert with_learned_stops(
        replace(SHAPE, eos_token_id=BOS), tokenizer, (TEXT,)
    ).stop_token_ids == (BOS,)
    assert with_learned_stops(
        replace(SHAPE, eos_token_id=None), tokenizer, (TEXT,)
    ).stop_token_ids == (END,)
    tokenizer.eos_token = None
    with pytest.raises(ConfigError, match="neither model nor tokenizer has an end-of-text token"):
        with_learned_stops(replace(SHAPE, eos_token_id=None), tokenizer, (TEXT,))
