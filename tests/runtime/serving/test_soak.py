"""A soak: thousands of requests with random lengths, stops, errors and cancellations."""

from __future__ import annotations

import gc
from collections import Counter
from typing import Any

import numpy as np
import pytest

import runtime
from runtime.server.live.memory import process_bytes
from runtime.serving.request import Request
from runtime.serving.serving_loop import ServingLoop
from runtime.serving.settings import ServeSettings
from tests.helpers.tiny import tiny_model

NUM_REQUESTS = 600
"""20,000 have been run by hand."""
IN_FLIGHT = 96
SETTINGS = ServeSettings(scheduler="fifo", batch=48, rows=48, context=24, chunk=256)


def random_request(random: np.random.Generator, number: int) -> Request:
    prompt = random.integers(2, 200, random.integers(1, 12)).tolist()
    stop = random.integers(2, 200, 20).tolist() if random.random() < 0.3 else []
    return Request(
        id=str(number), prompt=prompt, max_tokens=int(random.integers(1, 8)), stop_token_ids=stop
    )


@pytest.mark.filterwarnings("ignore:.*ended with an error")
def test_every_request_ends_once_and_memory_stays_flat() -> None:
    random = np.random.default_rng(0)
    model: Any = tiny_model("olmoe")
    ended: Counter[str] = Counter()
    finishes: Counter[str] = Counter()
    sizes = []
    with runtime.load(model, memory=0.5).expertflow as engine:
        loop, sent = ServingLoop(engine, None, SETTINGS), 0
        while sent < NUM_REQUESTS or not loop.is_idle:
            while sent < NUM_REQUESTS and sent - len(ended) < IN_FLIGHT:
                loop.submit(random_request(random, sent))
                sent += 1
            if random.random() < 0.3:
                loop.cancel(str(random.integers(sent)))
            for result in loop.step():
                ended[result.id] += 1
                finishes[result.finish] += 1
            if loop.num_steps % 20 == 0:
                gc.collect()
                sizes.append(process_bytes())
        engine.check_integrity()
        assert loop.num_failed_steps == 0
    assert ended == {str(number): 1 for number in range(NUM_REQUESTS)}
    assert {"length", "cancelled"} <= set(finishes)
    settled = sizes[len(sizes) // 3]
    assert sizes[-1] < 1.1 * settled
