"""Forwards and hooks that are not transformers' own: captured only where they say that they may."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from benchmarks.replay.text_replay import TextReplay
from runtime.engine.guards.changes import capturable, uncapturable
from tests.helpers.tiny import tiny_model


def hook(*_: Any) -> None:
    pass


@capturable
def declared(*_: Any) -> None:
    pass


def test_a_hook_keeps_steps_uncaptured_unless_it_declares_itself() -> None:
    model: Any = tiny_model("olmoe")
    head = model.get_output_embeddings()
    assert uncapturable(model) is None
    with_hook = head.register_forward_hook(hook)
    assert uncapturable(model) == "lm_head has a forward hook"
    with_hook.remove()
    head.register_forward_hook(declared)
    head.forward = partial(declared, head.forward)
    assert uncapturable(model) is None
    head.forward = partial(hook, head.forward)
    assert uncapturable(model) == "lm_head has a forward of its own"


@pytest.mark.parametrize("routes", [True, False])
def test_a_replayed_text_leaves_steps_capturable(routes: bool) -> None:
    model: Any = tiny_model("olmoe")
    replay = TextReplay(model, 1, 8, torch.device("cpu"), routes=routes)
    with replay.installed():
        assert uncapturable(model) is None
