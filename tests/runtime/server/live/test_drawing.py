"""How the page draws: only what changed, at a pace, and never back and forth."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest

from tests.helpers.browser import chromium

CHANGED = """async ([layers, experts]) => {
  const { ExpertMap } = await import("/page/map.js");
  const canvas = document.getElementById("map");
  const map = new ExpertMap(canvas, document.getElementById("cell"));
  map.shape(layers, experts);
  const looks = [];
  for (let step = 0; step < 12; step += 1) {
    const on = (salt) => (key) => (key * 31 + step * 17 + salt * key * step) % 7 < 2 ? 1 : 0;
    map.mark([on(1), on(2), on(3), on(4)]);
    map.present("a step");
    const changed = canvas.toDataURL();
    map.draw();
    looks.push([changed, canvas.toDataURL()]);
  }
  return looks;
}"""
PACED = """async () => {
  const { Pace } = await import("/page/pace.js");
  const pace = new Pace();
  const times = [];
  const draw = () => times.push(performance.now());
  const until = performance.now() + 1500;
  while (performance.now() < until) {
    pace.ask(draw);
    pace.ask(draw);
    await new Promise((done) => setTimeout(done, 5));
  }
  return times;
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with chromium() as browser:
        yield browser


@pytest.fixture
def page(browser: Any, address: str) -> Iterator[Any]:
    context = browser.new_context()
    page = context.new_page()
    page.goto(address)
    page.wait_for_selector("#status[data-state=live]")
    yield page
    context.close()


@pytest.mark.parametrize("shape", [(4, 8), (8, 32), (24, 128), (6, 256)])
def test_a_map_of_which_changes_are_drawn_looks_as_one_that_is_drawn_whole(
    page: Any, shape: tuple[int, int]
) -> None:
    looks = page.evaluate(CHANGED, list(shape))
    assert len({whole for _, whole in looks}) > 5
    assert all(changed == whole for changed, whole in looks)


def test_drawings_are_a_fifth_of_a_second_apart_at_least(page: Any) -> None:
    times = page.evaluate(PACED)
    assert 2 <= len(times) <= 8
    assert all(later - sooner > 180 for sooner, later in pairwise(times))


def test_the_panel_is_as_wide_with_a_scroll_bar_as_without(page: Any) -> None:
    gutter = "panel => getComputedStyle(panel).scrollbarGutter"
    assert page.eval_on_selector("#live", gutter) == "stable"
