"""Run where the checkers of lm-evaluation-harness are: `python ifeval_checks.py DIRECTORY`, with ifeval.jsonl in it."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp

from sdar_jax import save_pretrained
from sdar_jax.cli import main
from sdar_jax.evaluation import TASKS
from tests.data.conftest import make_byte_tokenizer
from tests.tiny import tiny_model

TASK = TASKS["ifeval"]
KANNADA = "ಹ್ಯಾಂಬರ್ಗರ್ ಒಂದು ಸ್ಯಾಂಡ್‌ವಿಚ್ ಆಗಿದೆ ಎಂದು ಹಲವರು ಹೇಳುತ್ತಾರೆ."
FAREWELL = "Is there anything else I can help with?"
BLOG = "Write a blog post about the most interesting things you have seen or ridden on public transportation."
FOUR_SECTIONS = "Section 1\nName\nSection 2\nSkills\nSection 3\nWork\nSection 4\nMore"
SENTENCES = "I sleep. Dr. Smith walks. She reads! Is it late? It is."
# Of each kind of instruction a prompt of the file that has it alone, an answer that follows it and one that does not.
BY_HAND = {
    1001: ("punctuation:no_comma", "Hie thee to Kyoto fair.", "Hie thee to Kyoto, friend."),
    1005: ("detectable_content:number_placeholders", "[name] " * 12, "[name] " * 11),
    1019: ("change_case:english_lowercase", "why do the boys have horns?", "Why do the boys have horns?"),
    102: ("detectable_format:number_bullet_lists", "Hi\n* a\n* b\n* c", "* a\n* b\n* c\n* d"),
    1072: ("length_constraints:number_words", "sleep " * 400, "sleep " * 399),
    1092: ("length_constraints:number_words", "sushi " * 299, "sushi " * 300),
    1075: ("detectable_format:json_format", '```json\n{"diaper": "soft"}\n```', "{diaper: soft}"),
    1082: ("length_constraints:number_paragraphs", "He wakes.\n***\nA game.", "He wakes.\n\nA game."),
    1098: ("combination:two_responses", "Yahweh\n******\nAllah", "Yahweh\n***\nAllah"),
    1108: ("language:response_language", KANNADA, "Yes, many people say that hamburgers are sandwiches."),
    1128: ("startend:end_checker", f"Negative. {FAREWELL}", f"{FAREWELL} Negative."),
    1130: ("keywords:letter_frequency", "Is a big sofa a bed?", "That is the point."),
    1131: ("detectable_format:multiple_sections", FOUR_SECTIONS, FOUR_SECTIONS.replace("Section 3", "Part 3")),
    1147: ("keywords:forbidden_words", "My fellow Americans.", "We shall resolve this issue."),
    122: ("startend:quotation", '"The net is old."', 'The "net" is old.'),
    1246: ("detectable_content:postscript", "A soft chair.\n\nP.P.S. Buy it.", "A soft chair.\n\nP.S. Buy it."),
    1268: ("length_constraints:number_sentences", SENTENCES, f"{SENTENCES} Yes."),
    1307: ("detectable_format:number_highlighted_sections", "*coffee* " * 15, "*coffee* " * 14 + "coffee"),
    1322: ("detectable_format:title", "<<kotlin vs java>>\nBoth.", "<kotlin vs java>\nBoth."),
    1393: ("keywords:frequency", "Synonyms, synonyms and synonyms.", "Synonyms and synonyms."),
    1480: ("combination:repeat_prompt", f"{BLOG}\n\nA goat.", f"Sure! {BLOG}\n\nA goat."),
    1531: ("keywords:existence", "The Constable of Atlantis.", "The constable."),
    1566: ("change_case:english_capital", "I REGRET IT ALL. THIS MEANS SORROW.", "I REGRET it ALL."),
    1592: ("change_case:capital_word_frequency", "WIND and SUN and WATER", "WIND and sun and WATER"),
    1954: (
        "length_constraints:nth_paragraph_first_word",
        "a\n\nb\n\nc\n\nd\n\ne\n\nf\n\nSummary, then: seeds.",
        "a\n\nb\n\nc\n\nd\n\ne\n\nSummary, then: seeds.\n\ng",
    ),
    227: ("detectable_format:constrained_response", "My answer is no.", "No, it is not."),
}  # fmt: skip
STRANGE = (
    "",
    "\n",
    "é😀\ufffd",
    "((((",
    "\\",
    "*" * 40,
    "***",
    '"',
    "1 2 3",
    "{" * 2000,
    "\x00a",
    "[[]]" * 99,
)


def check_file(directory, problems):
    records = [json.loads(line) for line in (directory / "ifeval.jsonl").open()]
    assert len(problems) == len(records) == 541
    for problem, record in zip(problems.values(), records, strict=True):
        assert problem.record == record
        assert problem.messages == [{"role": "user", "content": record["prompt"]}]


def check_each_kind(directory, problems):
    kinds = {
        kind for problem in problems.values() for kind in problem.record["instruction_id_list"]
    }
    assert {kind for kind, _, _ in BY_HAND.values()} == kinds and len(kinds) == 25
    for key, (kind, good, bad) in BY_HAND.items():
        problem = problems[str(key)]
        assert problem.record["instruction_id_list"] == [kind], key
        for text, right in ((good, True), (bad, False)):
            grade = TASK.grade(problem, text)
            assert grade.correct is right, (key, kind, text)
            assert grade.reason == (None if right else f"does not follow {kind}")


def check_several_instructions(directory, problems):
    """No commas, three highlights, at least 300 words."""
    good = "*a* and *b* and *c* " + "word " * 297
    for text, followed in (
        (good, [True, True, True]),
        (good + ", so", [False, True, True]),
        (good.replace("*c*", "c"), [True, False, True]),
        ("*a* *b* *c* word", [True, True, False]),
        ("no, never", [False, False, False]),
    ):
        grade = TASK.grade(problems["1000"], text)
        assert grade.correct is all(followed), text
        assert grade.other_scores["instruction_strict"] == followed, text


def check_loose_reading(directory, problems):
    """It forgives a first and a last line, but not a comma between them."""
    for text, loose in (
        ("Sure, here it is:\nHie thee.", True),
        ("Hie:\nhie, friend.\nHie.", False),
    ):
        grade = TASK.grade(problems["1001"], text)
        assert not grade.correct
        assert grade.other_scores["prompt_loose"] == [loose]
        assert grade.other_scores["instruction_loose"] == [loose]


def check_strange_answers(directory, problems):
    """None raises; an empty one follows nothing; the same answer has the same grade in any order."""
    for problem in problems.values():
        grades = [TASK.grade(problem, text) for text in STRANGE]
        assert not grades[0].correct and grades[0].answer is None
        assert not any(grades[0].other_scores["instruction_loose"])
    # In German, of which langdetect is sure one time in five.
    found = [TASK.grade(problems["3682"], "Ja ok, hamburger sandwich").correct for _ in range(40)]
    assert len(set(found)) == 1


def check_command(directory, problems):
    model = tiny_model(jnp.float32, vocab_size=320, mask_token_id=300, max_position_embeddings=4096)
    save_pretrained(model, directory / "model")
    make_byte_tokenizer().save_pretrained(directory / "model")
    command = ["evaluate", "--model", str(directory / "model"), "--output", str(directory / "out")]
    command += [
        "--tasks",
        f"ifeval={directory / 'ifeval.jsonl'}",
        "--max-new-tokens",
        "16",
        "--limit",
        "4",
    ]
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        assert main(command) == 0
    row, others = printed.getvalue().splitlines()[1:]
    assert row.startswith("ifeval  4 ")
    assert others.startswith("ifeval: instruction strict ") and "prompt loose" in others
    lines = [json.loads(line) for line in (directory / "out" / "ifeval.jsonl").open()]
    (scores,) = json.loads((directory / "out" / "results.json").read_text())
    for name, score in scores["other_scores"].items():
        entries = [right for line in lines for right in line["other_scores"][name]]
        assert score == sum(entries) / len(entries)


def check_missing_data(directory, problems):
    """One line, whatever the packages print."""
    code = "from sdar_jax.evaluation import TASKS\nTASKS['ifeval'].load('ifeval.jsonl')"
    environment = {**os.environ, "NLTK_DATA": "", "HOME": str(directory / "home")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=directory, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 1 and not done.stdout
    assert "punkt_tab, which is not there" in done.stderr.splitlines()[-1]


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    loaded = {problem.id: problem for problem in TASK.load(str(folder / "ifeval.jsonl"))}
    checks = (
        check_file,
        check_each_kind,
        check_several_instructions,
        check_loose_reading,
        check_strange_answers,
        check_command,
        check_missing_data,
    )
    for check in checks:
        check(folder, loaded)
        print(check.__name__, "passed", flush=True)
