"""Decode steps over the shared key/value cache, uncaptured, on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

pytest.importorskip("triton")

from runtime.cuda.decode.graph_step import DecodeStep
from runtime.kv.size import storage_bytes
from runtime.kv.state_kinds import unsupported
from runtime.kv.static_cache import shared_cache
from runtime.kv.storage import Storage
from tests.helpers.architectures import architecture_config, architecture_model
from tests.helpers.fake_cuda import Stream
from tests.helpers.tiny import tiny_model

CONTEXT = 24
STATES = (
    "qwen3_next",
    "lfm2_moe",
    "llama4_text",
    "zaya",
    "deepseek_v32",
    "minimax",
    "inkling_text",
)
"""Recurrent, convolved, in chunks, both at once, indexed, lightning, with distances."""
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "olmoe": ("olmoe", {}),
    "qwen3_moe": ("qwen3_moe", {}),
    "mixtral with a window": ("mixtral", {"sliding_window": 5}),
    "mixtral, eager": ("mixtral", {"attn_implementation": "eager"}),
    "gpt_oss": ("gpt_oss", {}),
}


class StockExperts:
    """The model's own experts run: nothing to begin, nothing to tell."""

    ledger = torch.zeros(0, dtype=torch.int32)

    def begin_step(self) -> None: ...

    def end_step(self) -> None: ...


def make(name: str) -> Any:
    if name in STATES:
        return with_chunks(architecture_model(name))
    kind, overrides = KINDS[name]
    options = dict(overrides)
    attention = options.pop("attn_implementation", None)
    model: Any = tiny_model(kind, **options)
    if attention is not None:
        model.set_attn_implementation(attention)
    return model


def with_chunks(model: Any) -> Any:
    """Chunks so short that prompts have several."""
    if hasattr(model.config, "attention_chunk_size"):
        model.config.attention_chunk_size = 4
    return model


def step_of(model: Any, storage: Storage, batch: int) -> DecodeStep:
    experts: Any = StockExperts()
    cache = shared_cache(storage, model.config.get_text_config(decoder=True))
    stream: Any = Stream()
    return DecodeStep(
        model, model.forward, cache, experts, batch=batch, context=storage.context,
        device=torch.device("cpu"), stream=stream,
    )  # fmt: skip


def prompt(batch: int, length: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Token ids and mask, every row padded at the left but the last."""
    generator = torch.Generator().manual_seed(seed)
    ids_BT = torch.randint(2, 256, (batch, length), generator=generator)
    padding_B1 = torch.arange(batch - 1, -1, -1)[:, None]
    return ids_BT, (torch.arange(length) >= padding_B1).long()


@torch.no_grad()
def by_steps(step: DecodeStep, model: Any, ids_BT: Tensor, mask_BT: Tensor, count: int) -> Tensor:
    """Logits [B, count + 1, V] of the prompt's end and of `count` greedy steps after it."""
    step.cache.reset()
    positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
    output = model(
        input_ids=ids_BT, attention_mask=mask_BT, position_ids=positions_BT,
        past_key_values=step.cache, use_cache=True,
    )  # fmt: skip
    logits = [output.logits[:, -1]]
    step.start(ids_BT.shape[1], positions_BT[:, -1] + 1, mask_BT.bool())
    step.ids_B1.copy_(logits[0].argmax(-1, keepdim=True))
    for _ in range(count):
        step._run()
        assert step.logits_BV is not None
        logits.append(step.logits_BV.clone())
    return torch.stack(logits, 1)


@torch.no_grad()
def by_the_library(model: Any, ids_BT: Tensor, mask_BT: Tensor, count: int) -> Tensor:
    """The same with transformers' own dynamic cache and masks."""
    past, logits = None, []
    for number in range(count + 1):
        positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
        output = model(
            input_ids=ids_BT if number == 0 else ids_BT[:, -1:], attention_mask=mask_BT,
            position_ids=positions_BT[:, -(ids_BT.shape[1] if number == 0 else 1) :],
            past_key_values=past, use_cache=True,
        )  # fmt: skip
        past = output.past_key_values
        logits.append(output.logits[:, -1])
        ids_BT = torch.cat([ids_BT, logits[-1].argmax(-1, keepdim=True)], 1)
        mask_BT = torch.cat([mask_BT, torch.ones_like(mask_BT[:, :1])], 1)
    return torch.stack(logits, 1)


@torch.no_grad()
def test_a_prompt_may_come_in_pieces() -> None:
    """What comes first attends to itself alone, the rest to all that is stored."""
    model = make(next(iter(KINDS)))
    ids_BT, mask_BT = torch.randint(2, 256, (1, 9)), torch.ones(1, 9, dtype=torch.int64)
    step = step_of(model, Storage(1, 24), 1)
    for _ in range(2):  # what the storage held before does not matter
        step.cache.reset()
        assert step.cache.get_seq_length() == 0
        for piece, so_far in ((ids_BT[:, :5], 5), (ids_BT[:, 5:], 9)):
            output = model(input_ids=piece, past_key_values=step.cache, use_cache=True)
            assert step.cache.get_seq_length() == so_far
        want = by_the_library(model, ids_BT, mask_BT, 0)
        torch.testing.assert_close(output.logits[:, -1:], want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("name", [*KINDS, *STATES])
def test_steps_give_the_librarys_logits(name: str, batch: int) -> None:
    """Also where a window or chunk is shorter than the prompt, and for rows with padding."""
    model = make(name)
    assert unsupported(model.config) is None
    step = step_of(model, Storage(batch, CONTEXT), batch)
    ids_BT, mask_BT = prompt(batch, 9)
    ours, theirs = (
        by_steps(step, model, ids_BT, mask_BT, 5),
        by_the_library(model, ids_BT, mask_BT, 5),
    )
    atol = 2e-5 if name == "qwen3_next" else 1e-5  # its recurrence: 1.1e-5 on one processor
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=atol)
    assert step.has_own_attention == (name not in ("deepseek_v32", "inkling_text"))


SIZES = ("deepseek_v3", "gemma4_text", "mimo_v2_flash")
"""Compressed keys, two sizes of heads with shared keys, keys and values of several widths."""
ARCHITECTURES = "afmoe deepseek_v3 gemma4_text granitemoe_swa jetmoe laguna mimo_v2_flash".split()  # noqa: SIM905


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_attention_of_many_makes_is_the_projects_own(kind: str) -> None:
    """Latent, of two head sizes, with keys shared between layers, with sinks, with gates."""
    model: Any = architecture_model(kind)
    step = step_of(model, Storage(2, CONTEXT), 2)
    given = *prompt(2, 7), 1
    ours, theirs = by_steps(step, model, *given), by_the_library(model, *given)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    assert step.has_own_attention


@pytest.mark.parametrize("change", ["its kwargs", "its mask", "its keys", "its sinks"])
def test_attention_that_no_kernel_has_is_left_to_the_model(
    change: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the midst of a pass too: the last layer is the one that is out of the common."""
    model = make("olmoe")
    last = model.model.layers[-1].self_attn
    get = ALL_ATTENTION_FUNCTIONS.get_interface

    def strange(name: str, default: Any) -> Any:
        function = get(name, default)

        def run(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
            if module is last and query.shape[2] == 1:
                if change == "its kwargs":
                    kwargs["position_bias"] = torch.arange(float(CONTEXT)).view(1, 1, 1, -1)
                elif change == "its mask":
                    mask = mask & (torch.arange(CONTEXT) != 3)
                elif change == "its keys":
                    key, value, mask = key[:, :, 4:], value[:, :, 4:], mask[..., 4:]
                else:
                    module.sinks = torch.zeros(4)
            return function(module, query, key, value, mask, **kwargs)

        return run

    monkeypatch.setattr(ALL_ATTENTION_FUNCTIONS, "get_interface", strange)
    steps = [step_of(model, Storage(2, CONTEXT), 2) for _ in range(2)]
    steps[1]._attention = None
    given = *prompt(2, 7), 2
    ours, models = (by_steps(step, model, *given) for step in steps)
    assert torch.equal(ours[:, 1:], models[:, 1:])
    assert not steps[0].has_own_attention


def test_a_step_tells_its_best_logit_and_feeds_its_choice_to_itself() -> None:
    model = make("olmoe")
    step = step_of(model, Storage(3, CONTEXT), 3)
    logits_BTV = by_steps(step, model, *prompt(3, 6), 2)
    assert step.outcome is not None
    best_B, tokens_B = step.outcome[:3].view(torch.float32), step.outcome[3:6]
    assert torch.equal(best_B, logits_BTV[:, -1].max(-1).values)
    assert torch.equal(tokens_B.long(), logits_BTV[:, -1].argmax(-1))
    assert torch.equal(step.ids_B1[:, 0], tokens_B.long())


def test_batch_sizes_take_turns_in_one_storage() -> None:
    model, storage = make("gpt_oss"), Storage(3, CONTEXT)
    steps = {batch: step_of(model, storage, batch) for batch in (1, 3)}
    alone = {
        batch: by_steps(step_of(model, Storage(batch, CONTEXT), batch), model, *prompt(batch, 7), 2)
        for batch in (1, 3)
    }
    for batch in (3, 1, 3):
        again = by_steps(steps[batch], model, *prompt(batch, 7), 2)
        assert torch.equal(again, alone[batch])
    used = storage.num_bytes
    by_steps(steps[3], model, *prompt(3, 12), 1)
    assert storage.num_bytes == used


@pytest.mark.parametrize("name", ["olmoe", *STATES])
def test_a_new_sequence_does_not_see_the_last_one(name: str) -> None:
    model = make(name)
    step = step_of(model, Storage(1, CONTEXT), 1)
    first = by_steps(step, model, *prompt(1, 5), 4)
    by_steps(step, model, *prompt(1, 16, seed=1), 2)
    assert torch.equal(by_steps(step, model, *prompt(1, 5), 4), first)


@pytest.mark.parametrize("name", ["mixtral with a window", "qwen3_next", "lfm2_moe", "minimax"])
def test_a_step_that_is_taken_back_leaves_no_trace(name: str) -> None:
    """As the warm-up before a capture does it."""
    model = make(name)
    step = step_of(model, Storage(2, CONTEXT), 2)
    undisturbed = by_steps(step, model, *prompt(2, 7), 1)[:, -1]
    by_steps(step, model, *prompt(2, 7), 0)
    saved = step.save()
    with torch.no_grad():
        for _ in range(2):
            step._run()
            step.restore(saved)
        step._run()
    assert step.logits_BV is not None
    assert torch.equal(step.logits_BV, undisturbed)


def test_the_last_position_of_the_context_can_be_used() -> None:
    model = make("olmoe")
    step = step_of(model, Storage(1, 10), 1)
    ids_BT, mask_BT = prompt(1, 6)
    ours = by_steps(step, model, ids_BT, mask_BT, 4)
    torch.testing.assert_close(
        ours, by_the_library(model, ids_BT, mask_BT, 4), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("name", [*KINDS, *STATES, *SIZES])
def test_the_caches_size_is_known_before_it_is_made(name: str) -> None:
    model = architecture_model(name) if name in SIZES else make(name)
    storage = Storage(2, CONTEXT)
    by_steps(step_of(model, storage, 2), model, *prompt(2, 5), 0)
    assert storage.num_bytes == storage_bytes(model, 2, CONTEXT)


def test_attention_that_a_step_cannot_run_is_refused_by_name() -> None:
    config = make("olmoe").config
    config._attn_implementation = "flash_attention_2"
    assert "flash_attention_2" in str(unsupported(config))
    config = make("gpt_oss").config
    config.layer_types = ["full_attention", "compressed_sparse_attention"] * 2
    assert "compressed_sparse_attention" in str(unsupported(config))
    for name, reason in {"qwen4_exp_text": "indexer", "deepseek_v4": "compressed"}.items():
        assert reason in str(unsupported(architecture_config(name)))


def poison(storage: Storage) -> None:
    for tensor in storage._tensors.values():
        tensor.fill_(float("nan"))


@pytest.mark.parametrize("seen_before", [True, False])
def test_numbers_that_were_not_finite_do_not_outlive_their_sequence(seen_before: bool) -> None:
    """A NaN that one batch size left in the storage must not reach another."""
    model, storage = make("olmoe"), Storage(2, CONTEXT)
    step = step_of(model, storage, 1)
    if seen_before:
        by_steps(step, model, *prompt(1, 5), 1)
    by_steps(step_of(model, storage, 2), model, *prompt(2, 5), 1)
    poison(storage)
    assert by_steps(step, model, *prompt(1, 5), 3).isfinite().all()
