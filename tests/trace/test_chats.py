"""trace.sources.chats: every known form of conversation is traced as its turns, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from routing.cli import parse
from tests.helpers.tiny import tiny_tokenizer
from trace.settings import CollectSettings
from trace.sources import Tally, read_texts, tokenize
from trace.sources.chats import content_of

TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)
TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]
SHARE_GPT = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
PARTS = [
    {"role": "user", "content": [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]},
    {"role": "assistant", "content": "ho"},
]
FORMS: dict[str, dict[str, Any]] = {
    "messages": {"messages": TURNS},
    "sharegpt": {"id": "7", "conversations": SHARE_GPT},
    "content parts": {"messages": PARTS},
    "prompt and completion": {"prompt": "hi", "completion": "ho"},
    "prompt and completion in turns": {"prompt": TURNS[:1], "completion": TURNS[1:]},
    "alpaca": {"instruction": "hi", "input": "", "output": "ho", "text": None},
    "dolly": {"instruction": "hi", "context": "", "response": "ho", "category": "qa"},
    "question and answer": {"question": "hi", "answer": "ho"},
}


def prompts(
    path: Path, *, answer: bool = False, tally: Tally | None = None, **options: Any
) -> list[str]:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    settings = CollectSettings(model="m", dataset=[str(path)], out="o", **options)
    found = tokenize(
        read_texts(settings, tally), tokenizer, max_tokens=999,
        chat_template=settings.chat_template, answer=answer, tally=tally,
    )  # fmt: skip
    return [str(tokenizer.decode(prompt.ids)) for prompt in found]


def write(path: Path, *rows: dict[str, Any]) -> Path:
    if path.suffix == ".parquet":
        Dataset.from_list(list(rows)).to_parquet(path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("form", FORMS)
def test_every_known_form_gives_the_same_turns(form: str, suffix: str, tmp_path: Path) -> None:
    if suffix == "parquet" and form == "content parts":
        pytest.skip("a Parquet column has one type")
    path = write(tmp_path / f"chat.{suffix}", FORMS[form])
    assert prompts(path, chat_template=True) == ["[user]hi[assistant]ho"]
    assert prompts(path, chat_template="plain") == ["hi\n\nho"]
    with pytest.raises(ValueError, match=rf"chat\.{suffix}: its rows are chats, not text; give"):
        prompts(path)


def test_an_input_belongs_to_the_instruction_and_a_system_prompt_comes_first() -> None:
    row = {"system": "be brief", "instruction": "add", "input": "1 2", "output": "3"}
    assert content_of(row, None) == [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "add\n\n1 2"},
        {"role": "assistant", "content": "3"},
    ]


def test_other_keys_of_a_turn_reach_the_template() -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f"}], "name": None}
    assert content_of({"messages": [call]}, None) == [
        {"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}
    ]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"chosen": TURNS, "rejected": TURNS}, "preference pairs: give --column chosen or"),
        ({"messages": [{"from": "ghost", "value": "boo"}]}, "the unknown role 'ghost'"),
        ({"messages": [{"speaker": "a", "text": "b"}]}, "a turn with speaker, text, not role and"),
        ({"messages": [{"role": "user"}]}, "a turn with role, not role and content"),
        ({"messages": [{}]}, "a turn with nothing"),
        ({"messages": [{"role": "user", "content": None}]}, "a turn with role, content, not"),
        ({"messages": [{"role": "user", "content": 3}]}, "whose content is int, not text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image", "url": "x"}]}]},
            "turns with image: only text can be traced",
        ),
        ({"dialog": ["hi", "ho"]}, "'dialog' holds a list of str, not of turns"),
        ({"messages": {"role": "user"}}, "'messages' holds dict, neither text nor turns"),
        ({"question": "q", "answer": ["a", "b"]}, "'answer' holds list, not text: give --column"),
        ({"question": "q", "answers": {"text": ["a"]}}, "no known form of chat; its columns are q"),
        (
            {"instruction": "a", "output": "b", "history": [["c", "d"]]},
            "a column 'history', which would be lost",
        ),
        ({"body": "x"}, "no column 'text' and no known form of chat; its columns are body"),
    ],
)
def test_what_is_no_known_form_is_refused_by_name(row: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        content_of(row, None)


def test_a_column_that_is_named_wins(tmp_path: Path) -> None:
    rows = {"text": "no", "chosen": TURNS, "rejected": TURNS[:1]}
    path = write(tmp_path / "pairs.jsonl", rows)
    assert prompts(path, column="chosen", chat_template=True) == ["[user]hi[assistant]ho"]


def test_chats_without_words_are_empty_documents(tmp_path: Path) -> None:
    tally = Tally()
    empty: list[dict[str, Any]] = [{"messages": []}, {"messages": [TURNS[0] | {"content": " "}]}]
    path = write(tmp_path / "chats.jsonl", *empty, {"messages": TURNS}, {"messages": TURNS})
    assert len(prompts(path, chat_template=True, tally=tally)) == 2
    assert (tally.num_empty, tally.num_repeated) == (2, 1)


def test_a_template_may_come_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text("{% for m in messages %}<{{ m.content }}>{% endfor %}")
    path = write(tmp_path / "chats.jsonl", {"messages": TURNS})
    assert prompts(path, chat_template=str(tmp_path / "t.jinja")) == ["<hi><ho>"]
    with pytest.raises(ValueError, match=r"--chat_template absent.jinja: there is no such file"):
        prompts(path, chat_template="absent.jinja")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "rejects a chat of the roles user, as"),
        ("{{ messages[0].content.no.such }}", "chats: the chat template rejects"),
        ("{% for m in messages %}{{ m.value }}{% endfor %}", "writes none of a chat's turns"),
    ],
)
def test_a_template_that_rejects_or_loses_the_turns_is_an_error(
    template: str, message: str, tmp_path: Path
) -> None:
    (tmp_path / "t.jinja").write_text(template)
    path = write(tmp_path / "chats.jsonl", {"messages": TURNS})
    with pytest.raises(ValueError, match=message):
        prompts(path, chat_template=str(tmp_path / "t.jinja"))


def test_plain_text_is_not_rendered(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("hello")
    rows = write(tmp_path / "rows.jsonl", {"text": "hello"})
    for path in (tmp_path / "a.txt", rows):
        with pytest.raises(ValueError, match="--chat_template needs"):
            prompts(path, chat_template=True)


@pytest.mark.parametrize(
    ("words", "value"),
    [
        (["--chat_template"], True),
        (["--chat-template", "true"], True),
        (["--chat_template", "plain"], "plain"),
        (["--chat_template=t.jinja"], "t.jinja"),
        ([], False),
    ],
)
def test_the_option_is_a_flag_a_word_or_a_file(words: list[str], value: bool | str) -> None:
    argv = ["--model", "m", "--dataset", "d", "--out", "o", *words]
    assert parse(CollectSettings, argv, prog="collect").chat_template == value
