"""A character tokenizer for the demo's problems, with ChatML's special tokens and template."""

import string
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from demo.tasks import TASKS

# Rows of the embedding; those that no token uses are spare, and conversion gives the first of them to <|MASK|>.
VOCAB_SIZE = 128

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|unknown|>")
ROLES = ("system", "user", "assistant")
CHARACTERS = string.printable[:95] + "\n"

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def make_tokenizer(directory: Path | str) -> PreTrainedTokenizerFast:
    """Writes the tokenizer to `directory` as a Hugging Face directory, and returns it.

    Printable ASCII and the newline are a token each, and so are the name of a task before a space and the role of a
    turn before a newline. Any other character becomes <|unknown|>.
    """
    words = (*ROLES, *TASKS)
    tokens = (*SPECIAL, *words, *CHARACTERS)
    backend = Tokenizer(
        models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<|unknown|>")
    )
    pieces = rf"(?:{'|'.join(TASKS)})(?= )|(?:{'|'.join(ROLES)})(?=\n)|[\s\S]"
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(pieces), behavior="isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(
        [AddedToken(token, normalized=False, special=True) for token in SPECIAL]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token="<|unknown|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(str(directory))
    return tokenizer
