"""The page in a browser: the chat, the experts beside it, and what must never happen."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from runtime.engine.engine import Engine
from tests.helpers.accessibility import findings
from tests.helpers.browser import chromium
from tests.helpers.http_server import running

EVIL = (
    "<img src=x onerror=\"document.title='taken'\"><script>document.title='taken'</script><b>x</b>"
)
CHAT = "**/v1/chat/completions"
LONG = 60


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@contextmanager
def opened(browser: Any, address: str, **options: Any) -> Iterator[Any]:
    """The page in a window of its own, where no script and no request may fail."""
    context = browser.new_context(**options)
    page, errors = context.new_page(), list[str]()
    page.set_default_timeout(20_000)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.route(CHAT, go_on)
    page.goto(address)
    try:
        yield page
        assert errors == []
    finally:
        context.close()


def go_on(route: Any) -> None:
    """Let the model, whose text is chance, not end before its limit."""
    route.continue_(post_data=json.dumps(route.request.post_data_json | {"ignore_eos": True}))


def is_live(page: Any) -> None:
    page.wait_for_selector("#status[data-state=live]")


def say(page: Any, text: str, *, max_tokens: int = LONG) -> None:
    if not page.is_visible("#max_tokens"):
        page.click("#sampling summary")
    page.fill("#max_tokens", str(max_tokens))
    page.fill("#prompt", text)
    page.press("#prompt", "Enter")


def has_answered(page: Any, count: int = 1) -> str:
    """The text of the newest of `count` answers, which has ended."""
    page.wait_for_function(
        "count => document.querySelectorAll('.message.assistant:not(.running) .notes').length"
        " === count",
        arg=count,
    )
    return str(page.locator(".message.assistant .text").last.text_content())


@contextmanager
def guessed(browser: Any, engine: Engine, folder: Path) -> Iterator[Any]:
    """The page of a server whose token is `secret`, after a wrong one."""
    (folder / "token").write_text("secret")
    server = running(engine, token_file=folder / "token")
    with server as address, opened(browser, address) as page:
        page.fill("#token", "guess")
        page.click("#token-form button")
        page.wait_for_selector("#token-wrong:visible")
        yield page


def finished(address: str, how: str) -> float:
    lines = httpx.get(f"{address}/metrics").text.splitlines()
    name = f'expertflow_requests_total{{finish="{how}"}}'
    return next(float(line.split()[-1]) for line in lines if line.startswith(name))


def test_an_answer_is_streamed_while_the_map_follows(browser: Any, address: str) -> None:
    with opened(browser, address) as page:
        is_live(page)
        say(page, "hello")
        page.wait_for_function(
            "() => document.querySelector('.message.running .text')?.textContent.length > 3"
        )
        has_answered(page)
        assert f"{LONG} tokens" in page.text_content(".message.assistant .notes")
        page.wait_for_function("() => document.getElementById('rate').textContent.includes('%')")
        assert "LRU" in page.text_content("#rate-beside")
        assert "hit" in page.get_attribute("#map", "aria-label")
        drawn = "canvas => canvas.getContext('2d').getImageData(0, 0, canvas.width, 40).data"
        assert page.eval_on_selector("#map", f"canvas => new Set(({drawn})(canvas)).size") > 10


def test_stop_ends_the_answer_here_and_on_the_server(browser: Any, address: str) -> None:
    before = finished(address, "cancelled")
    with opened(browser, address) as page:
        is_live(page)
        say(page, "go on", max_tokens=150)
        page.wait_for_function(
            "() => document.querySelector('.message.running .text')?.textContent.length > 3"
        )
        page.click("#stop")
        has_answered(page)
        assert page.text_content(".message.assistant .notes span") == "stopped"
        assert page.is_visible("#send")
        page.wait_for_timeout(500)
    assert finished(address, "cancelled") == before + 1


def test_regenerate_puts_another_answer_in_the_place_of_the_last(
    browser: Any, address: str
) -> None:
    with opened(browser, address) as page:
        is_live(page)
        page.click("#sampling summary")
        page.fill("#temperature", "2")
        say(page, "hello")
        first = has_answered(page)
        page.click(".again")
        page.wait_for_selector("#stop:visible")
        assert has_answered(page) != first
        assert page.locator(".message").count() == 2
        page.click("#clear")
        assert page.locator(".message").count() == 0
        assert page.is_visible("#empty")


def test_the_sampling_settings_are_what_is_asked_for(browser: Any, address: str) -> None:
    with opened(browser, address) as page:
        is_live(page)
        page.click("#sampling summary")
        page.fill("#system", "be brief")
        page.fill("#seed", "7")
        page.fill("#temperature", "1.5")
        with page.expect_request(CHAT) as asked:
            say(page, "hello", max_tokens=9)
        body = json.loads(asked.value.post_data)
        has_answered(page)
    assert body["messages"][0] == {"role": "system", "content": "be brief"}
    assert (body["seed"], body["temperature"], body["max_tokens"]) == (7, 1.5, 9)


def test_a_model_without_a_chat_template_continues_the_text(browser: Any, engine: Engine) -> None:
    with running(engine, template=None) as address, opened(browser, address) as page:
        is_live(page)
        page.wait_for_selector("#system:disabled", state="attached")
        say(page, "hello")
        has_answered(page)


def test_what_a_model_writes_stays_text(browser: Any, engine: Engine) -> None:
    """The answer, the message, the model's name and an error, all with HTML and scripts."""
    piece = {"choices": [{"delta": {"content": EVIL}, "finish_reason": None}]}
    body = f"data: {json.dumps(piece)}\n\ndata: [DONE]\n\n"
    kind = {"content-type": "text/event-stream"}
    with running(engine, name=EVIL) as address, opened(browser, address) as page:
        is_live(page)
        page.route(CHAT, lambda route: route.fulfill(body=body, headers=kind))
        say(page, EVIL)
        assert has_answered(page) == EVIL
        assert page.locator(".message.user .text").text_content() == EVIL
        page.wait_for_function(
            "evil => document.getElementById('model').textContent === evil", arg=EVIL
        )
        error = json.dumps({"error": {"message": EVIL}})
        page.route(CHAT, lambda route: route.fulfill(status=400, body=error))
        say(page, "again")
        page.wait_for_selector("#failure:visible")
        assert page.text_content("#failure") == EVIL
        assert page.locator("#chat :is(img, script, b), #model *").count() == 0
        assert page.title() != "taken"


def test_the_policy_lets_no_foreign_script_run(browser: Any, address: str) -> None:
    with opened(browser, address) as page:
        page.evaluate(
            "() => { const one = document.createElement('script');"
            " one.textContent = 'document.title = \"taken\"'; document.body.append(one); }"
        )
        assert page.title() != "taken"
        fetched = "() => fetch('https://example.invalid/').then(() => 'sent', () => 'refused')"
        assert page.evaluate(fetched) == "refused"


def test_the_stream_is_taken_up_again_after_the_server_was_away(
    browser: Any, engine: Engine
) -> None:
    with running(engine) as address:
        context = browser.new_context()
        page = context.new_page()
        page.goto(address)
        is_live(page)
    page.wait_for_selector("#status[data-state=lost]")
    with running(engine, at=int(address.rpartition(":")[2])):
        page.wait_for_selector("#status[data-state=live]", timeout=20_000)
        say(page, "hello")
        has_answered(page)
        page.wait_for_function("() => document.getElementById('rate').textContent.includes('%')")
        context.close()


def test_four_clients_at_once_have_answers_of_their_own(browser: Any, address: str) -> None:
    windows = ExitStack()
    pages = [windows.enter_context(opened(browser, address)) for _ in range(4)]
    for page in pages:
        is_live(page)
    for number, page in enumerate(pages):
        say(page, f"client {number}", max_tokens=40 + number)
    for number, page in enumerate(pages):
        has_answered(page)
        assert f"{40 + number} tokens" in page.text_content(".message.assistant .notes")
        page.wait_for_function("() => document.getElementById('rate').textContent.includes('%')")
    windows.close()


def test_the_token_is_asked_for_until_it_is_right(
    browser: Any, engine: Engine, tmp_path: Path
) -> None:
    with guessed(browser, engine, tmp_path) as page:
        page.fill("#token", "secret")
        page.press("#token", "Enter")
        is_live(page)
        say(page, "hello")
        has_answered(page)
        assert page.evaluate("() => JSON.stringify(localStorage)") == "{}"
        page.reload()
        is_live(page)
        assert not page.is_visible("#ask-token")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_one_view_at_a_time_and_nothing_beside_it(
    browser: Any, address: str, scheme: str
) -> None:
    phone = {"width": 360, "height": 740}
    with opened(browser, address, viewport=phone, color_scheme=scheme) as page:
        is_live(page)
        assert page.is_visible("#chat")
        assert not page.is_visible("#live")
        say(page, "hello")
        has_answered(page)
        page.click("#show-live")
        assert page.is_visible("#map")
        assert not page.is_visible("#chat")
        assert page.evaluate("() => document.documentElement.scrollWidth") <= phone["width"]
        assert page.locator("#map").bounding_box()["width"] > 200


@pytest.mark.parametrize(
    "window",
    [
        {"color_scheme": "light"},
        {"color_scheme": "dark"},
        {"viewport": {"width": 360, "height": 740}},
    ],
    ids=["light", "dark", "phone"],
)
def test_nothing_is_out_of_reach_for_those_who_see_little_or_use_keys(
    window: dict[str, Any], browser: Any, address: str
) -> None:
    with opened(browser, address, **window) as page:
        is_live(page)
        assert findings(page) == []
        say(page, "hello", max_tokens=20)
        has_answered(page)
        assert findings(page) == []
        if page.is_visible("#show-live"):
            page.click("#show-live")
            assert findings(page) == []


def test_the_dialog_for_the_token_is_within_reach(
    browser: Any, engine: Engine, tmp_path: Path
) -> None:
    with guessed(browser, engine, tmp_path) as page:
        assert findings(page) == []


def test_what_cannot_be_read_is_found(browser: Any, address: str) -> None:
    with opened(browser, address) as page:
        is_live(page)
        page.evaluate(
            "() => { document.querySelector('label[for=prompt]').remove();"
            " const prompt = document.getElementById('prompt'); prompt.placeholder = '';"
            " document.getElementById('send').style.color = '#3b82d8'; }"
        )
        found = findings(page)
    assert any("label: #prompt" in one for one in found)
    assert any("color-contrast: #send" in one for one in found)


def test_the_first_paint_takes_less_than_a_second(browser: Any, address: str) -> None:
    with opened(browser, address) as page:
        is_live(page)
        painted = "() => performance.getEntriesByName('first-contentful-paint')[0].startTime"
        assert page.evaluate(painted) < 1000
