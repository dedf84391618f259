"""Every architecture of the installed transformers in captured steps on a GPU.

Tiny random models; each is tried with prompts of several lengths, alone and in a padded batch.
"""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import runtime
from runtime.kv.state_kinds import unsupported
from tests.gpu.offloaded import needs_gpu
from tests.helpers.architectures import ARCHITECTURES, architecture_model, is_known
from tests.helpers.logits_recorder import with_logits

pytestmark = needs_gpu
NEW = 64
CONTEXT = 704
LENGTHS = (1, 17, 600)
ROUNDING = 1e-4
"""Of float32 logits, as a share of the largest."""
KNOWN = [kind for kind in ARCHITECTURES if is_known(kind)]


def model_of(kind: str) -> Any:
    """With room for the longest prompt."""
    return architecture_model(kind, max_position_embeddings=1024)


@pytest.fixture(autouse=True)
def all_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Convolutions of prompts in float32 too: by default cuDNN rounds what they multiply."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def skip_uncaptured(model: Any) -> None:
    """Skip what is known to decode otherwise, with the reason."""
    config = model.config
    if not hasattr(model, "generate"):
        pytest.skip("not captured: it does not generate")
    if config.is_encoder_decoder:
        pytest.skip("not captured: an encoder-decoder model")
    if (why := unsupported(config.get_text_config(decoder=True))) is not None:
        pytest.skip(f"not captured: {why}")


def inputs(batch: int, length: int) -> tuple[Tensor, Tensor]:
    """Token ids and mask; every row of a batch but the last is padded at the left."""
    ids_BT = torch.randint(2, 250, (batch, length), generator=torch.Generator().manual_seed(length))
    padding_B1 = torch.arange(batch - 1, -1, -1)[:, None].clamp(max=length - 1)
    return ids_BT, (torch.arange(length) >= padding_B1).long()


def generate(model: Any, ids_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens and the logits of the new ones [B, NEW, V]."""
    torch.manual_seed(0)
    tokens_BT, logits_BTV = with_logits(
        model.generate, ids_BT, attention_mask=mask_BT, max_new_tokens=NEW, do_sample=False,
        pad_token_id=0, eos_token_id=None,
    )  # fmt: skip
    return tokens_BT.cpu(), logits_BTV


def logits_after(model: Any, tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """Of the tokens that were generated, by the model's own forward in one pass: [B, NEW, V]."""
    mask_BT = torch.cat([mask_BT, mask_BT.new_ones(len(mask_BT), NEW)], 1)
    positions_BT = (mask_BT.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        logits = model(
            input_ids=tokens_BT, attention_mask=mask_BT, position_ids=positions_BT
        ).logits
    found: Tensor = logits[:, -NEW - 1 : -1].float().cpu()
    return found


def gap(found_BTV: Tensor, expected_BTV: Tensor) -> float:
    """How far logits are apart, as a share of the largest."""
    return float((found_BTV - expected_BTV).abs().max() / expected_BTV.abs().max())


@pytest.mark.parametrize("kind", KNOWN)
def test_captured_steps_give_the_stock_models_logits(kind: str) -> None:
    """In float32: those of each new token after the ones before it, in one pass; or, where the
    stock model's own steps give others than that (Nemotron-H: by 1e-3 in float64 too), in steps.
    """
    stock = model_of(kind)
    skip_uncaptured(stock)
    offloaded: Any = runtime.load(
        model_of(kind), memory=0.6, device="cuda", batch=4, context=CONTEXT, cpu_share=False
    )
    stock = stock.cuda()
    with offloaded.expertflow as engine, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for length in LENGTHS:
            for batch in (1, 4):
                ids_BT, mask_BT = (given.cuda() for given in inputs(batch, length))
                tokens_BT, logits_BTV = generate(offloaded, ids_BT, mask_BT)
                if engine.decode_path != "graph":
                    pytest.skip(f"not captured: {engine.decode_path}")
                expected_BTV = logits_after(stock, tokens_BT.cuda(), mask_BT)
                if gap(logits_BTV, expected_BTV) > ROUNDING:
                    stock_BT, expected_BTV = generate(stock, ids_BT, mask_BT)
                    assert torch.equal(tokens_BT, stock_BT), (length, batch)
                found = gap(logits_BTV, expected_BTV)
                assert found <= ROUNDING, (length, batch, found)
        engine.check_integrity()


@pytest.mark.parametrize("kind", KNOWN)
def test_residency_changes_no_bit(kind: str) -> None:
    """In bfloat16, with two fifths of the experts in slots and with all of them."""
    skip_uncaptured(architecture_model(kind))
    found = []
    for memory in (0.4, 1.0):
        model: Any = runtime.load(
            model_of(kind).bfloat16(), memory=memory, device="cuda", batch=4, context=CONTEXT,
            cpu_share=False,
        )  # fmt: skip
        with model.expertflow as engine, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            given = [[one.cuda() for one in inputs(batch, 17)] for batch in (1, 4)]
            results = [result for one in given for result in generate(model, *one)]
            if engine.decode_path != "graph":
                pytest.skip(f"not captured: {engine.decode_path}")
        found.append(results)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
