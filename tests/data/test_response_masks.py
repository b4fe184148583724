"""What of a conversation is learned: against a table written by hand, and against the template rendered turn by turn.

The templates are Qwen3's and SmolLM2's own, under templates/. By default a tokenizer of bytes reads them; where they
can be had, the models' own tokenizers do, and their templates are held to the files here.
"""

import json
from pathlib import Path

import pytest
import yaml

from sdar_jax.data import DataConfig, SourceConfig
from sdar_jax.data.chat import ChatRenderer
from sdar_jax.data.documents import Document, DocumentMaker
from sdar_jax.data.record_forms import as_messages
from sdar_jax.data.sources import Source
from tests.data.conftest import EOS, make_byte_tokenizer

HERE = Path(__file__).parent
TABLE = yaml.safe_load((HERE / "conversations.yaml").read_text(encoding="utf-8"))
MODELS = ("qwen3", "smollm2")
HEADER = "<|im_start|>"
REAL = [
    pytest.param("qwen3", marks=pytest.mark.network),
    pytest.param("smollm2", marks=[pytest.mark.network, pytest.mark.slow]),
]


def template(model):
    return (HERE / "templates" / f"{model}.jinja").read_text(encoding="utf-8").removesuffix("\n")


BYTES = {model: make_byte_tokenizer(template(model)) for model in MODELS}


@pytest.fixture(scope="module")
def document(tmp_path_factory):
    """document(entry, tokenizer, **config) -> what the pipeline makes of an entry's record."""
    folder = tmp_path_factory.mktemp("records")

    def make(entry, tokenizer):
        path = folder / "record.jsonl"
        path.write_text(json.dumps(entry["record"]) + "\n")
        prompt, answer = entry.get("columns", (None, "text"))
        source = SourceConfig(str(path), "chat", field=answer, prompt_field=prompt)
        config = DataConfig((source,), 4096, 1, loss="response", pad_to_block=False)
        eos = tokenizer.convert_tokens_to_ids(EOS)
        maker = DocumentMaker(config, tokenizer, [Source(source)], block_size=4, eos_token_id=eos)
        return maker(0)

    return make


def learned_runs(document):
    """The runs of tokens with loss."""
    runs, before = [], False
    for token, learned in zip(document.tokens.tolist(), document.loss_mask.tolist(), strict=True):
        if learned and not before:
            runs.append([])
        if learned:
            runs[-1].append(token)
        before = learned
    return runs


def holds(found, expected, tokenizer):
    """Holds a document, or why there is none, to the table's word on it."""
    if isinstance(expected, str):
        assert not isinstance(found, Document), "it is to be refused"
        assert expected in found.reason
        return
    assert isinstance(found, Document), found.reason
    eos = tokenizer.convert_tokens_to_ids(EOS)
    assert found.tokens[-1] == eos and found.loss_mask[-1] == found.loss_mask[-2]
    runs = learned_runs(found)
    if found.loss_mask[-1]:
        # The document's end, which the pipeline adds.
        assert runs[-1].pop() == eos
    encoded = [tokenizer.encode(text, add_special_tokens=False) for text in expected]
    assert runs == encoded, [tokenizer.decode(run) for run in runs]


def test_the_table_is_large_enough():
    assert len({entry["name"] for entry in TABLE}) == len(TABLE)
    for model in MODELS:
        assert sum(isinstance(entry[model], list) for entry in TABLE) >= 60


@pytest.mark.parametrize("model", MODELS)
def test_learned_text_is_the_tables(model, document):
    for_each(lambda entry: holds(document(entry, BYTES[model]), entry[model], BYTES[model]))


@pytest.mark.parametrize("model", REAL)
def test_learned_text_is_the_tables_with_the_models_own_tokenizer(model, document, request):
    tokenizer = request.getfixturevalue(model)
    assert tokenizer.chat_template.removesuffix("\n") == template(model)
    for_each(lambda entry: holds(document(entry, tokenizer), entry[model], tokenizer))


# Turn by turn.


class Turns:
    """A conversation as the template shows it after each of its turns; nothing of the renderer is used."""

    def __init__(self, entry, tokenizer):
        prompt, answer = entry.get("columns", (None, None))
        record = as_messages(entry["record"], prompt=prompt, answer=answer)
        tools = record.get("tools")
        self._apply = tokenizer.apply_chat_template
        self._options = {
            "tools": json.loads(tools) if isinstance(tools, str) else tools,
            "tokenize": False,
            **({} if (on := record.get("enable_thinking")) is None else {"enable_thinking": on}),
            **record.get("chat_template_kwargs", {}),
        }
        self.messages = [plain(message) for message in record["messages"]]
        self.text = self.shown(self.messages)

    def shown(self, messages, prompt=False):
        return self._apply(messages, add_generation_prompt=prompt, **self._options)

    def start(self, i):
        """Where the assistant begins to write turn i; None where decoding would have seen other text before it."""
        before = self.shown(self.messages[:i])
        prompt = self.shown(self.messages[:i], prompt=True)
        if self.text.startswith(prompt):
            return len(prompt)
        # The prompt alone holds an empty thought.
        header = f"{before}{HEADER}assistant\n"
        opened = "</think>" in prompt[len(header) :] and not self.text.startswith(
            "<think>", len(header)
        )
        return len(header) if opened and self.text.startswith(header) else None

    def end(self, i):
        """Where turn i ends: in front of the next message, which a mark in its middle finds; or with the text."""
        if i == len(self.messages) - 1:
            return len(self.text)
        following = self.messages[i + 1]
        content = following["content"]
        half = len(content) // 2
        marked = {**following, "content": f"{content[:half]}☃{content[half:]}"}
        text = self.shown([*self.messages[: i + 1], marked, *self.messages[i + 2 :]])
        at = text[: text.index("☃") - half].rindex(HEADER)
        assert text[:at] == self.text[:at] and text[at - 1] == "\n"
        return at - 1


def plain(message):
    """A message in the form that transformers tells users to give templates."""
    content = message.get("content") or ""
    if isinstance(content, list):
        content = "".join(part["text"] for part in content)
    known = ("reasoning_content", "reasoning", "thinking")
    thoughts = [message[name] for name in known if message.get(name) is not None]
    calls = [with_arguments(call) for call in message.get("tool_calls") or []]
    return {
        **message,
        "content": content,
        **({"reasoning_content": thoughts[0]} if thoughts else {}),
        "tool_calls": calls,
    }


def with_arguments(call):
    function = call.get("function", call)
    given = function["arguments"] or {}
    arguments = json.loads(given) if isinstance(given, str) else given
    return {"function": {**function, "arguments": arguments}}


def unlearned(message):
    return any(message.get(name) == 0 for name in ("weight", "train", "training", "loss"))


def spans_turn_by_turn(turns):
    """[start, end) of each learned turn; None for one that does not go on from its prompt."""
    return [
        None if (start := turns.start(i)) is None else (start, turns.end(i))
        for i, message in enumerate(turns.messages)
        if message["role"] == "assistant" and not unlearned(message)
    ]


def spans_of(pieces):
    spans, at = [], 0
    for text, learned in pieces:
        if learned:
            spans.append((at, at + len(text)))
        at += len(text)
    return spans


def check_turn_by_turn(entry, tokenizer, model):
    expected = entry[model]
    if isinstance(expected, str) and "otherwise" not in expected:
        return
    turns = Turns(entry, tokenizer)
    found = spans_turn_by_turn(turns)
    if isinstance(expected, str):
        assert None in found
        return
    prompt, answer = entry.get("columns", (None, None))
    record = as_messages(entry["record"], prompt=prompt, answer=answer)
    pieces = ChatRenderer(tokenizer, warn=lambda line: None).pieces(record)
    assert "".join(text for text, _ in pieces) == turns.text
    assert spans_of(pieces) == found
    assert [turns.text[start:end] for start, end in found] == expected


@pytest.mark.parametrize("model", MODELS)
def test_learned_spans_are_those_of_the_template_turn_by_turn(model):
    for_each(lambda entry: check_turn_by_turn(entry, BYTES[model], model))


@pytest.mark.parametrize("model", REAL)
def test_learned_spans_turn_by_turn_with_the_models_own_tokenizer(model, request):
    tokenizer = request.getfixturevalue(model)
    for_each(lambda entry: check_turn_by_turn(entry, tokenizer, model))


def for_each(check):
    """Runs a check on every entry of the table; a failure names its entry."""
    for entry in TABLE:
        try:
            check(entry)
        except AssertionError as error:
            raise AssertionError(f"{entry['name']}: {error}") from None
