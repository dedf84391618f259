"""Whether an architecture decodes in captured steps, and whether its sequences are served together.

Captured steps run uncaptured here, with the engine of a GPU on the CPU (`fake_cuda`).
"""

from __future__ import annotations

import os
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import runtime
from runtime.serving.request import Request
from tests.helpers.architectures import architecture_model
from tests.helpers.logits_recorder import with_logits
from tests.helpers.serving import by_id

NEW = 4
LONG = 600
"""Tokens of a long prompt: of tiny models windows have 512 at most."""
MEMORY = 0.6


def captured(kind: str, *, long: bool = False, **options: Any) -> str:
    """ "yes": captured steps give the stock model's greedy tokens and logits, of one sequence, of
    two of which one is padded, and, if `long`, of one that is longer than windows; else the reason
    that it decodes otherwise. options: of `load_fake`.
    """
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is imported
    from tests.helpers.fake_cuda import fake_cuda, load_fake

    random = torch.Generator().manual_seed(1)
    ids_BT, long_1T = (
        torch.randint(2, 250, size, generator=random) for size in ((2, 9), (1, LONG))
    )
    mask_BT = torch.ones_like(ids_BT)
    padded_BT = mask_BT.clone()
    padded_BT[0, :3] = 0
    stock = _model(kind)
    if not stock.config.is_encoder_decoder:
        _assert_norms_are_the_models(stock)
    inputs = [(ids_BT[:1], mask_BT[:1]), (ids_BT, padded_BT)]
    if long:
        inputs.append((long_1T, torch.ones_like(long_1T)))
    expected = [with_logits(_continued, stock, *given) for given in inputs]
    with pytest.MonkeyPatch.context() as patch, fake_cuda(patch), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = load_fake(_model(kind), memory=MEMORY, batch=2, context=LONG + NEW, **options)
        for given, (tokens, logits) in zip(inputs, expected, strict=True):
            got = with_logits(_continued, model, *given)
            if model.expertflow.decode_path != "graph":
                return f"no: {model.expertflow.decode_path}"
            assert torch.equal(got[0], tokens), "other tokens"
            torch.testing.assert_close(got[1], logits, rtol=1e-4, atol=1e-4)
    return "yes"


def _model(kind: str) -> Any:
    """With room for the long prompt."""
    return architecture_model(kind, max_position_embeddings=LONG + NEW)


@torch.no_grad()
def _assert_norms_are_the_models(model: Any) -> None:
    """Norms that a GPU's steps fuse are those that the model has. `fake_cuda` leaves them alone."""
    from runtime.cuda.decode.fused_forward import FusedNorms

    ids_1T = torch.arange(2, 4)[None]
    want = model(input_ids=ids_1T).logits
    with FusedNorms(model).in_use():
        got = model(input_ids=ids_1T).logits
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def served(kind: str) -> str:
    """ "yes": sequences that are served together, their prompts in pieces, get the stock model's
    greedy tokens; else the reason that they are not.
    """
    prompts = [torch.arange(2, 2 + length).tolist() for length in (1, 9, 14)]
    stock: Any = architecture_model(kind)
    expected = [_continued(stock, torch.tensor([prompt]))[0].tolist() for prompt in prompts]
    model: Any = runtime.load(architecture_model(kind), memory=MEMORY)
    requests = [
        Request(id=str(number), prompt=prompt, max_tokens=NEW, ignore_eos=True)
        for number, prompt in enumerate(prompts)
    ]
    found = by_id(model.expertflow.serve(requests, batch=3, rows=4, context=32, chunk=4))
    for number, (prompt, want) in enumerate(zip(prompts, expected, strict=True)):
        result = found[str(number)]
        if result.error:
            return f"no: {result.error}"
        assert prompt + list(result.token_ids) == want, "other tokens"
    return "yes"


def _continued(model: Any, ids_BT: Tensor, mask_BT: Tensor | None = None, **options: Any) -> Tensor:
    torch.manual_seed(0)
    mask_BT = torch.ones_like(ids_BT) if mask_BT is None else mask_BT
    tokens = model.generate(
        ids_BT, attention_mask=mask_BT, max_new_tokens=NEW, do_sample=False, pad_token_id=0,
        eos_token_id=None, **options,
    )  # fmt: skip
    assert isinstance(tokens, Tensor)
    return tokens
