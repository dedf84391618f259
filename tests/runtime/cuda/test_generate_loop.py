"""The decode loop in place of transformers' own: the same tokens, whatever is asked for."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList
from transformers.generation.stopping_criteria import (
    MaxTimeCriteria,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

pytest.importorskip("triton")

from runtime.cuda.decode.generate_loop import Prompt, decode, takes_over
from tests.helpers.tiny import PAD, tiny_model

NEW = 10


class ChosenTokens(NamedTuple):
    tokens_B: list[int]
    logits_BV: Tensor


class Recomputing:
    """Prefill and step by the whole sequence anew; as a captured step, it can feed itself."""

    def __init__(self, model: Any, ids_BT: Tensor, mask_BT: Tensor | None) -> None:
        self._model, self._ids_BT = model, ids_BT
        self._mask_BT = torch.ones_like(ids_BT) if mask_BT is None else mask_BT
        self.given: list[bool] = []

    def prefill(self) -> Tensor:
        positions_BT = (self._mask_BT.cumsum(-1) - 1).clamp(min=0)
        output = self._model(
            input_ids=self._ids_BT, attention_mask=self._mask_BT, position_ids=positions_BT
        )
        self._next_B = output.logits[:, -1].argmax(-1)
        return output.logits[:, -1]

    def step(self, tokens_B: Tensor | None, more: bool) -> ChosenTokens:
        self.given.append(tokens_B is not None)
        tokens_B = self._next_B if tokens_B is None else tokens_B
        self._ids_BT = torch.cat([self._ids_BT, tokens_B[:, None]], 1)
        self._mask_BT = torch.cat([self._mask_BT, torch.ones_like(self._mask_BT[:, :1])], 1)
        logits_BV = self.prefill()
        return ChosenTokens(logits_BV.argmax(-1).tolist(), logits_BV)


class Ours:
    """generate with our loop, as the engine hands it over."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.steps: Recomputing | None = None

    def generate(self, ids_BT: Tensor, **kwargs: Any) -> Any:
        loop = partial(self._decode, streamer=kwargs.get("streamer"))
        return self._model.generate(ids_BT, custom_generate=loop, **kwargs)

    def _decode(
        self, model: Any, input_ids: Tensor, logits_processor: Any = None,
        stopping_criteria: Any = None, generation_config: Any = None, synced_gpus: bool = False,
        streamer: Any = None, **model_kwargs: Any,
    ) -> Any:  # fmt: skip
        self.steps = Recomputing(model, input_ids, model_kwargs.get("attention_mask"))
        prompt = Prompt(
            input_ids,
            model_kwargs,
            logits_processor,
            stopping_criteria,
            generation_config,
            streamer,
        )
        return decode(prompt, self.steps.prefill, self.steps.step)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model("olmoe")


def prompts() -> tuple[Tensor, Tensor]:
    """Three rows, two of them padded at the left."""
    ids_BT = torch.randint(2, 256, (3, 6), generator=torch.Generator().manual_seed(3))
    mask_BT = torch.tensor([[1] * 6, [0] * 2 + [1] * 4, [0] + [1] * 5])
    return ids_BT.masked_fill(mask_BT == 0, PAD), mask_BT


def both(model: Any, **options: Any) -> tuple[Any, Any, Ours]:
    """What transformers generates and what our loop does, from the same random numbers."""
    ids_BT, mask_BT = prompts()
    options = {"attention_mask": mask_BT, "max_new_tokens": NEW} | options
    torch.manual_seed(11)
    theirs = model.generate(ids_BT, **options)
    torch.manual_seed(11)
    ours = Ours(model)
    return theirs, ours.generate(ids_BT, **options), ours


def an_end(model: Any) -> list[int]:
    """End tokens: the first row stops after six tokens, the second after four, the third never."""
    ids_BT, mask_BT = prompts()
    new_BT = model.generate(
        ids_BT, attention_mask=mask_BT, max_new_tokens=NEW, eos_token_id=None
    )[:, 6:]  # fmt: skip
    return [int(new_BT[0, 5]), int(new_BT[1, 3])]


class Halving(LogitsProcessor):
    """Changes what is chosen, and its input in place."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores[:, input_ids[0, -1] % 128 :] *= 0.5
        return scores


class AfterFour(StoppingCriteria):
    """Stops the rows of even index after four new tokens."""

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        done = input_ids.shape[1] >= 10
        return torch.arange(len(input_ids)) % 2 == 0 if done else torch.zeros(3, dtype=torch.bool)


GENERATIONS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy without an end": {"eos_token_id": None},
    "one token": {"max_new_tokens": 1},
    "a length of prompt and answer": {"max_new_tokens": None, "max_length": 9},
    "sampled": {"do_sample": True},
    "sampled warmly from few": {"do_sample": True, "temperature": 1.5, "top_k": 20, "top_p": 0.9},
    "processed": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
    "own processor": {"logits_processor": LogitsProcessorList([Halving()])},
    "at least eight": {"min_new_tokens": 8},
    "own criterion": {"stopping_criteria": StoppingCriteriaList([AfterFour()])},
    "in time": {"stopping_criteria": StoppingCriteriaList([MaxTimeCriteria(1e6)])},
}


@pytest.mark.parametrize("ending", [False, True])
@pytest.mark.parametrize("name", GENERATIONS)
def test_the_tokens_are_transformers(name: str, ending: bool, model: Any) -> None:
    """With end tokens, finished rows are padded until the last row ends."""
    end = {"eos_token_id": an_end(model)} if ending else {}
    theirs, ours, _ = both(model, **({"pad_token_id": PAD} | end | GENERATIONS[name]))
    assert torch.equal(ours, theirs)


def test_rows_end_by_themselves_and_the_batch_with_its_last(model: Any) -> None:
    end = an_end(model)
    ids_BT, _ = prompts()
    theirs, ours, _ = both(model, eos_token_id=end, pad_token_id=7)
    assert torch.equal(ours, theirs)
    is_pad_BT = ours[:, ids_BT.shape[1] :] == 7
    assert is_pad_BT.sum(1).tolist() == [NEW - 6, NEW - 4, 0]
    ours = Ours(model).generate(ids_BT[:1], max_new_tokens=8, eos_token_id=end, pad_token_id=7)
    assert ours.shape[1] == ids_BT.shape[1] + 6


def test_greedy_decoding_feeds_itself(model: Any) -> None:
    """No token goes to the device after the first."""
    _, _, ours = both(model)
    assert ours.steps is not None
    assert ours.steps.given == [True] + [False] * (NEW - 2)


def test_the_last_token_costs_no_step(model: Any) -> None:
    for options in ({}, {"do_sample": True}):
        _, _, ours = both(model, max_new_tokens=4, **options)
        assert ours.steps is not None
        assert len(ours.steps.given) == 3


class Collector(BaseStreamer):
    def __init__(self) -> None:
        self.parts: list[list[int]] = []
        self.ends = 0

    def put(self, value: Tensor) -> None:
        assert value.device.type == "cpu"
        self.parts.append(value.reshape(-1).tolist())

    def end(self) -> None:
        self.ends += 1


@pytest.mark.parametrize("options", [{}, {"do_sample": True}], ids=["greedy", "sampled"])
def test_a_streamer_gets_the_prompt_then_every_token_then_the_end(
    options: dict[str, Any], model: Any
) -> None:
    ids_BT = prompts()[0][:1]
    collectors = Collector(), Collector()
    for run, collector in zip((model.generate, Ours(model).generate), collectors, strict=True):
        torch.manual_seed(0)
        run(ids_BT, max_new_tokens=5, streamer=collector, **options)
    theirs, ours = collectors
    assert ours.parts == theirs.parts
    assert len(ours.parts) == 6
    assert (ours.ends, theirs.ends) == (1, 1)


def test_a_dict_is_returned_where_one_is_asked_for(model: Any) -> None:
    theirs, ours, _ = both(model, return_dict_in_generate=True)
    assert torch.equal(ours.sequences, theirs.sequences)
    assert type(ours) is type(theirs)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"output_scores": True, "return_dict_in_generate": True}, "output_scores"),
        ({"output_logits": True, "return_dict_in_generate": True}, "output_logits"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"output_attentions": True}, "output_attentions"),
        ({"use_cache": False}, "use_cache"),
        ({"prefill_chunk_size": 16}, "prefill_chunk_size"),
    ],
)
def test_what_the_loop_cannot_do_it_says(options: dict[str, Any], named: str) -> None:
    assert named in str(takes_over(GenerationConfig(**options)))
    assert takes_over(GenerationConfig()) is None
