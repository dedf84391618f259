"""What callers give as requests: text, dicts, token ids of any container; mistakes are visible."""

from __future__ import annotations

import dataclasses
import pickle
from collections.abc import Iterator
from pathlib import Path
from queue import Queue
from typing import Any

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

import runtime
from runtime.engine.engine import Engine
from runtime.serving.request import Request, Result
from tests.helpers.serving import SMALL, by_id, greedy, offloaded
from tests.helpers.tiny import EOS, tiny_model, tiny_tokenizer

TOKENIZER: Any = tiny_tokenizer()
IDS = TOKENIZER("ABC").input_ids
SHORT = {"context": 200}
ENDING: Any = {"num_hidden_layers": 2, "eos_token_id": [EOS, *range(200, 256)]}
"""A model that soon ends what it says, however many tokens it might."""


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with offloaded(tiny_model("olmoe", **ENDING)) as engine:
        yield engine


def serve(engine: Engine, requests: Any) -> list[Result]:
    results = list(engine.serve(requests, tokenizer=TOKENIZER, **(SMALL | SHORT)))
    return sorted(results, key=lambda result: int(result.id.rpartition("-")[2]))


PROMPTS = {
    "text": "ABC",
    "list": IDS,
    "tuple": tuple(IDS),
    "range": range(2, 5),
    "array": np.array(IDS),
    "scalars": [np.int64(i) for i in IDS],
    "tensor": torch.tensor(IDS),
    "tensor of one row": torch.tensor([IDS]),
    "small numbers": torch.tensor(IDS, dtype=torch.uint8),
    "list of one row": [IDS],
    "encoding": TOKENIZER("ABC"),
    "encoding of one row": TOKENIZER(["ABC"], return_tensors="pt"),
}


@pytest.mark.parametrize("kind", PROMPTS)
@pytest.mark.parametrize("form", ["alone", "mapping", "request"])
def test_a_prompt_may_come_in_any_container(engine: Engine, kind: str, form: str) -> None:
    prompt = PROMPTS[kind]
    item = {
        "alone": lambda: prompt,
        "mapping": lambda: {"prompt": prompt, "max_tokens": 4},
        "request": lambda: Request(prompt=prompt, max_tokens=4),
    }[form]()
    (result,) = serve(engine, [item])
    ids = [2, 3, 4] if kind == "range" else IDS
    assert result.finish != "error", result.error
    assert result.num_prompt == 3
    assert result.token_ids[:4] == greedy(engine.model, ids, 4)


def test_padding_is_no_part_of_a_prompt(engine: Engine) -> None:
    padded = TOKENIZER(["ABC", "A"], padding=True, return_tensors="pt")
    assert padded["input_ids"].shape == (2, 3)
    assert [result.num_prompt for result in serve(engine, padded)] == [3, 1]
    with_options = {"input_ids": padded["input_ids"][1:], "max_tokens": 2,
                    "attention_mask": padded["attention_mask"][1:]}  # fmt: skip
    (result,) = serve(engine, [with_options])
    assert result.num_prompt == 1 and len(result.token_ids) <= 2


@pytest.mark.parametrize(
    "requests",
    ["ABC", {"prompt": "ABC"}, Request(prompt="ABC"), torch.tensor(IDS), np.array([IDS]),
     TOKENIZER("ABC"), ["ABC"], ({"prompt": "ABC"},), iter(["ABC"])],
    ids=lambda value: type(value).__name__,
)  # fmt: skip
def test_one_request_by_itself_will_do(engine: Engine, requests: Any) -> None:
    (result,) = serve(engine, requests)
    assert result.num_prompt == 3 and result.finish != "error"


def test_items_come_through_a_queue_too(engine: Engine) -> None:
    queue: Queue[Any] = Queue()
    for item in ("ABC", {"prompt": "AB", "max_tokens": 3}, None):
        queue.put(item)
    assert [result.num_prompt for result in serve(engine, queue)] == [3, 2]


@pytest.mark.parametrize("requests", [5, None, b"ABC", torch.tensor([IDS, IDS]), 1.5])
def test_what_holds_no_requests_is_refused_at_once(engine: Engine, requests: Any) -> None:
    with pytest.raises(ValueError, match=r"holds no requests|several rows"):
        engine.serve(requests, tokenizer=TOKENIZER, **SMALL)


BAD_ITEMS: dict[str, tuple[Any, str]] = {
    "number": (5, "is no request"),
    "nothing": (None, "is no request"),
    "misspelt": ({"prompt": "a", "max_token": 3}, "did you mean 'max_tokens'"),
    "misspelt prompt": ({"promt": "a"}, "did you mean 'prompt'"),
    "unknown": ({"prompt": "a", "best_of": 3}, "'best_of' is no field of a request"),
    "no prompt": ({"max_tokens": 3}, "has no prompt"),
    "bad value": ({"prompt": "a", "top_p": 3}, "top_p=3"),
    "several rows": ([[2, 3], [4, 5]], "holds 2 prompts"),
    "fractions": ([2.7, 3.0], "2.7 is not a whole number"),
    "float tensor": (torch.tensor([2.0, 3.0]), "is not a whole number"),
    "flags": ([True, False], "is not a whole number"),
    "bytes": (b"ABC", "is of type bytes"),
    "set": ({2, 3}, "is of type set"),
    "text pieces": (["a", "b"], "is not a whole number"),
    "empty": ("", "the prompt is empty"),
    "empty list": ([], "the prompt is empty"),
}


@pytest.mark.parametrize("kind", BAD_ITEMS)
def test_a_mistake_is_seen_in_its_own_result_and_loses_nothing(engine: Engine, kind: str) -> None:
    item, message = BAD_ITEMS[kind]
    good = [Request(id="first", prompt="AB", max_tokens=3), Request(id="last", prompt="AB")]
    results = by_id(engine.serve([good[0], item, good[1]], tokenizer=TOKENIZER, **(SMALL | SHORT)))
    assert len(results) == 3
    assert results["first"].finish != "error" and results["last"].finish != "error"
    (bad,) = [result for id, result in results.items() if id not in ("first", "last")]
    assert bad.finish == "error" and message in bad.error


def test_a_refused_mapping_keeps_its_id(engine: Engine) -> None:
    results = by_id(engine.serve([{"id": "mine", "prompt": "a", "tok_k": 3}], tokenizer=TOKENIZER))
    assert results["mine"].finish == "error" and "top_k" in results["mine"].error


def test_text_is_served_with_the_tokenizer_beside_the_models_weights(tmp_path: Path) -> None:
    model: Any = tiny_model("olmoe", num_hidden_layers=2)
    model.save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    with runtime.load(tmp_path, memory=0.5).expertflow as engine:
        (result,) = engine.serve(["ABC"], context=200)
        assert result.num_prompt == 3 and result.finish != "error"
        assert result.text == TOKENIZER.decode(result.token_ids, skip_special_tokens=True)


def test_who_reads_only_the_text_is_warned_of_errors(engine: Engine) -> None:
    with pytest.warns(UserWarning, match=r"mine ended with an error: .*tokenizer="):
        (result,) = engine.serve([{"id": "mine", "prompt": "text"}])
    assert result.finish == "error"


def test_a_request_is_itself() -> None:
    request = Request(prompt="a")
    assert Request.of(request) is request


def test_requests_can_be_copied_pickled_and_put_into_sets() -> None:
    request = Request(prompt="a", logit_bias={3: 1}, json_schema={"type": "object"}, top_k=-1)
    assert pickle.loads(pickle.dumps(request)) == request
    assert dataclasses.replace(request, max_tokens=4) == dataclasses.replace(request, max_tokens=4)
    assert len({request, Request(prompt="a")}) == 2


def test_an_encoding_of_several_rows_is_no_single_prompt() -> None:
    several: Any = BatchEncoding({"input_ids": [[2, 3], [4]], "attention_mask": [[1, 1], [1]]})
    prompt: Any = Request(prompt=several).prompt
    assert prompt == [[2, 3], [4]]
