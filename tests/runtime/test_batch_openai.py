"""Lines of OpenAI's batch API: answered in its shape, as the server answers."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from runtime.batch.command import main
from runtime.serving.batch.settings import BatchSettings
from tests.helpers.serving import greedy
from tests.helpers.tiny import tiny_model, tiny_tokenizer

Directory = Callable[[str], Path]
TEMPLATE = "{% for m in messages %}{{ m.content }} {% endfor %}"


def line(id: str, url: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    return {"custom_id": id, "method": "POST", "url": url, "body": body}


def chat(id: str, **body: Any) -> dict[str, Any]:
    return line(id, "/v1/chat/completions", **body)


@pytest.fixture
def answers(tiny_directory: Directory, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """`answers(lines, fails)` runs the command and returns the lines that it wrote."""

    def start(lines: list[Any], *, fails: bool = False, **options: Any) -> list[dict[str, Any]]:
        dataset, out = tmp_path / "rows.jsonl", tmp_path / "out.jsonl"
        dataset.write_text("".join(json.dumps(one) + "\n" for one in lines))
        common: dict[str, Any] = {
            "memory": "0.5", "context": 64, "batch": 2, "chat_template": TEMPLATE, "name": "tiny",
        }  # fmt: skip
        settings = BatchSettings(
            model=str(tiny_directory("olmoe")), dataset=str(dataset), out=out, **(common | options)
        )
        if fails:
            with pytest.raises(SystemExit) as stopped:
                main(settings)
            assert stopped.value.code == 3
        else:
            main(settings)
        return [json.loads(one) for one in out.read_text().splitlines()]

    return start


def test_completions_and_chats_are_answered_as_the_server_answers(answers: Any) -> None:
    messages = [{"role": "user", "content": "alpha"}]
    told = answers([
        line("a", model="tiny", prompt=["alpha", "b"], max_tokens=4, temperature=0, n=2),
        chat("b", model="tiny", messages=messages, max_completion_tokens=4, temperature=0),
        {"prompt": "alpha", "max_tokens": 4},
    ])  # fmt: skip
    assert [one.get("custom_id") for one in told] == ["a", "b", None]
    assert {tuple(one) for one in told[:2]} == {("id", "custom_id", "response", "error")}
    assert [one["error"] for one in told[:2]] == [None, None]
    first, second = (one["response"]["body"] for one in told[:2])
    assert [one["response"]["status_code"] for one in told[:2]] == [200, 200]
    tokenizer, model = tiny_tokenizer(), tiny_model("olmoe")

    def greedily(prompt: str) -> str:
        tokens = greedy(model, tokenizer(prompt).input_ids, 4)
        return str(tokenizer.decode(list(tokens), skip_special_tokens=True))

    alpha, b = greedily("alpha"), greedily("b")
    assert [choice["text"] for choice in first["choices"]] == [alpha, alpha, b, b]
    assert first["object"] == "text_completion" and first["model"] == "tiny"
    assert first["usage"]["completion_tokens"] == 16
    assert second["object"] == "chat.completion"
    assert second["choices"][0]["message"]["content"] == greedily("alpha ")
    assert told[2]["text"] == alpha


@pytest.mark.parametrize(("bad", "status", "reason"), [
    (line("a", "/v1/embeddings", model="tiny", input="x"), 404, "/v1/embeddings"),
    (line("a", model="gpt-4o", prompt="x"), 404, "there is no model gpt-4o; tiny is"),
    (line("a", model="tiny", prompt="x", stream=True), 400, "cannot be streamed"),
    (line("a", model="tiny", prompt="x", max_token=3), 400, "did you mean max_tokens?"),
    (line("a", model="tiny", prompt="x", suffix="y"), 400, "suffix"),
    (line("a", model="tiny", prompt="x", max_tokens=900), 400, "exceed the context"),
    (line("a", model="tiny"), 400, "prompt"),
    (line("a", model="tiny", prompt="x", top_p=2), 400, "top_p"),
    (chat("a", model="tiny", messages=[{"role": "user", "content": 1}]), 400, "messages"),
    ({**line("a", model="tiny", prompt="x"), "method": "GET"}, 405, "POST"),
    ({"url": "/v1/completions", "body": {"prompt": "x"}}, 400, "custom_id"),
    ({"custom_id": "a", "method": "POST", "url": "/v1/completions"}, 400, "body"),
])  # fmt: skip
def test_a_line_that_cannot_be_answered_has_a_status_and_the_reason(
    bad: dict[str, Any], status: int, reason: str, answers: Any
) -> None:
    told, good = answers([bad, line("z", model="tiny", prompt="x", max_tokens=1)], fails=True)
    assert told["response"]["status_code"] == status
    assert reason in told["response"]["body"]["error"]["message"]
    assert told["custom_id"] == bad.get("custom_id")
    assert good["response"]["status_code"] == 200


def test_sampled_answers_are_the_same_in_every_run(answers: Any, tmp_path: Path) -> None:
    lines = [line("a", model="tiny", prompt="x", max_tokens=12, n=2)]
    texts = []
    for _ in range(2):
        (told,) = answers(lines)
        texts.append([choice["text"] for choice in told["response"]["body"]["choices"]])
        (tmp_path / "out.jsonl").unlink()
    assert texts[0] == texts[1]
    assert texts[0][0] != texts[0][1]


def test_without_the_extra_the_command_names_it_before_it_loads_the_model(
    answers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    needing = ("runtime.server", "runtime.batch.openai_lines")
    for name in [name for name in sys.modules if name.startswith(needing)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pydantic", None)
    with pytest.raises(ValueError, match=r"need pydantic: install moe-expertflow\[serve\]"):
        answers([line("a", model="tiny", prompt="x")])
    assert answers([{"prompt": "x", "max_tokens": 1}])


TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}
CALLING = TEMPLATE + "{% if tools %}<tool_call>{{ tools[0].function.name }}{% endif %}"


def test_tools_go_through_the_template_or_are_refused(answers: Any, tmp_path: Path) -> None:
    asked = {"model": "tiny", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}
    (told,) = answers([chat("a", **asked, tools=[TOOL])], fails=True)
    assert "tools: the model's chat template takes none" in json.dumps(told)
    (tmp_path / "out.jsonl").unlink()
    (tmp_path / "out.jsonl.partial").unlink()
    (told,) = answers([chat("a", **asked, tools=[TOOL])], chat_template=CALLING)
    assert told["response"]["status_code"] == 200
