"""The page in a browser, opened as a file: scrubbing, keys, and what must never happen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from routing.predictor_file.reader import open_predictor
from routing.shards import TraceReader
from runtime.replay.__main__ import write_page
from runtime.replay.recording import record
from runtime.replay.settings import ReplaySettings
from tests.helpers.accessibility import findings
from tests.helpers.browser import chromium
from tests.runtime.replay.conftest import EVIL, PROMPT_TOKENS, STORY, Traced


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


Opened = Callable[..., Any]


@pytest.fixture
def opened(browser: Any, traced: Traced, tmp_path: Path) -> Opened:
    """`opened(document)`: its page, in which no script may fail and nothing may be asked for."""

    @contextmanager
    def open_page(
        document: int, *, window: dict[str, Any] | None = None, **options: Any
    ) -> Iterator[Any]:
        out = tmp_path / "page.html"
        write_page(ReplaySettings(trace=traced.trace, out=out, document=document, **options))
        context = browser.new_context(**(window or {}))
        page, wrong = context.new_page(), list[str]()
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text))
        page.on("request", lambda asked: wrong.append(asked.url) if asked.url[:4] == "http" else 0)
        page.goto(out.as_uri())
        try:
            yield page
            assert wrong == []
        finally:
            context.close()

    return open_page


def scrub(page: Any, step: int) -> None:
    page.locator("#slider").evaluate(
        "(slider, step) => { slider.value = step; slider.dispatchEvent(new Event('input')); }", step
    )


def place(page: Any) -> str:
    return str(page.text_content("#place"))


def test_each_step_shows_the_hits_and_misses_of_the_recording(
    opened: Opened, traced: Traced
) -> None:
    reader, predictor = TraceReader(traced.trace), open_predictor(traced.predictor)
    recording = record(reader, reader.document(1), predictor=predictor)
    own, lru = recording.runs
    with opened(1, predictor=traced.predictor) as page:
        requests = loads = 0
        for step, seen in enumerate(recording.steps):
            scrub(page, step)
            used = sum(len(experts) for _, experts in seen.calls())
            missed = len(own.missed[step])
            requests, loads = requests + used, loads + missed
            assert page.text_content("#hits") == f"{used - missed} of {used}"
            assert page.text_content("#hits-beside") == f"LRU {used - len(lru.missed[step])}"
            label = page.get_attribute("#map", "aria-label")
            assert label.endswith(f"hit {used - missed} and missed {missed}")
            assert page.text_content("#rate") == f"{100 * (1 - loads / requests):.1f} %"
        assert page.text_content("#recall").endswith("%")


def test_the_text_follows_the_steps_and_leads_to_them(opened: Opened) -> None:
    with opened(1) as page:
        shown = page.text_content("#text").replace("·", "").replace("↵", "")
        assert shown == STORY
        assert page.locator(".token[aria-current]").count() == PROMPT_TOKENS
        assert page.text_content("#map-title").endswith(f"a prompt of {PROMPT_TOKENS} tokens")
        page.locator(".token").nth(PROMPT_TOKENS + 3).click()
        assert place(page).startswith("5 of ")
        assert page.locator(".token[aria-current]").count() == 1


def test_keys_and_buttons_move_and_play(opened: Opened) -> None:
    with opened(2) as page:
        count = int(place(page).split()[-1])
        for key, step in [
            ("ArrowRight", 2), ("ArrowRight", 3), ("ArrowLeft", 2), ("PageDown", 12),
            ("PageUp", 2), ("End", count), ("ArrowRight", count), ("Home", 1),
        ]:  # fmt: skip
            page.keyboard.press(key)
            assert place(page) == f"{step} of {count}", key
        page.focus("#slider")
        page.keyboard.press("ArrowRight")
        assert place(page).startswith("2 of "), "the slider's own keys count once"
        page.click("#on")
        assert place(page).startswith("3 of ")
        page.select_option("#pace", "40")
        page.click("#play")
        page.wait_for_function(
            "count => document.getElementById('place').textContent === `${count} of ${count}`",
            arg=count,
        )
        assert page.text_content("#play") == "Play", "it ends at the end"
        page.click("h1")
        page.keyboard.press(" ")
        page.wait_for_function("() => document.getElementById('play').textContent === 'Pause'")
        page.keyboard.press(" ")
        assert page.text_content("#play") == "Play"


def test_the_map_shows_either_cache(opened: Opened) -> None:
    with opened(2, residency=0.125) as page:
        scrub(page, 20)
        own = page.get_attribute("#map", "aria-label")
        pixels = "map => map.toDataURL()"
        drawn = page.eval_on_selector("#map", pixels)
        page.select_option("#shown", "lru")
        assert page.eval_on_selector("#map", pixels) != drawn
        page.select_option("#shown", "reuse")
        assert page.get_attribute("#map", "aria-label") == own
        assert page.eval_on_selector("#map", pixels) == drawn, "whichever way one came here"
        scrub(page, 19)
        page.keyboard.press("ArrowRight")
        assert page.eval_on_selector("#map", pixels) == drawn


def test_lru_alone_has_nothing_beside_it(opened: Opened) -> None:
    with opened(2, policy="lru") as page:
        assert not page.is_visible("#choice")
        assert page.locator(".beside-lru:visible").count() == 0
        assert "LRU" not in page.text_content("#rate-beside")


def test_what_a_trace_says_stays_text(opened: Opened) -> None:
    with opened(0) as page:
        assert page.text_content("#text").replace("·", "") == EVIL
        assert "<b>evil</b>" in page.text_content("#document")
        assert page.locator("#text :is(img, script, b), #document *").count() == 0
        assert page.title() != "taken"


def test_the_policy_lets_no_other_script_run_and_nothing_be_fetched(
    browser: Any, traced: Traced, tmp_path: Path
) -> None:
    out = tmp_path / "page.html"
    write_page(ReplaySettings(trace=traced.trace, out=out))
    evil = "<script>document.title = 'taken'</script></body>"
    out.write_text(out.read_text().replace("</body>", evil))
    context = browser.new_context()
    page = context.new_page()
    page.goto(out.as_uri())
    assert page.title() != "taken"
    fetched = "() => fetch('https://example.invalid/').then(() => 'sent', () => 'refused')"
    assert page.evaluate(fetched) == "refused"
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_out_of_reach_for_those_who_see_little_or_use_keys(
    scheme: str, opened: Opened, traced: Traced
) -> None:
    with opened(1, window={"color_scheme": scheme}, predictor=traced.predictor) as page:
        scrub(page, 3)
        assert findings(page) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_of_it_one_below_the_other(scheme: str, opened: Opened) -> None:
    size = {"width": 360, "height": 740}
    with opened(1, window={"viewport": size, "color_scheme": scheme}) as page:
        assert page.evaluate("() => document.documentElement.scrollWidth") <= size["width"]
        text, experts = (page.locator(name).bounding_box() for name in ("#reader", "#experts"))
        assert experts["y"] >= text["y"] + text["height"]
        assert page.locator("#map").bounding_box()["width"] > 200
        assert findings(page) == []
