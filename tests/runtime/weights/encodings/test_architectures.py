"""Quantised checkpoints of various architectures; `make compatibility` tries every one there is."""

from __future__ import annotations

import pytest

from runtime.weights.encodings.table import ENCODINGS
from tests.helpers.architectures import is_known
from tests.helpers.compatibility import logits
from tests.helpers.quantised import layouts_of
from tests.helpers.quantised.compatibility import DECODED, NOT_APPLICABLE, check_encodings

EVERY = dict.fromkeys(ENCODINGS, "yes")
STACKED = dict.fromkeys(ENCODINGS, NOT_APPLICABLE) | {"fp8-block": "yes", "nvfp4": "yes"}
CASES = {
    "deepseek_v3": EVERY,
    "gpt_oss": STACKED | {"mxfp4": "yes"},
    "jetmoe": STACKED,
    "llama4_text": STACKED,
    "longcat_flash": EVERY,
    "minimax_m2": EVERY,
    "mixtral": EVERY,
    "nemotron_h": EVERY,
    "nllb-moe": EVERY,
    "qwen3_5_moe": EVERY,
    "qwen3_vl_moe": STACKED | {"fp8-block": DECODED, "nvfp4": DECODED},
    "step3p7": STACKED,
}


@pytest.mark.sampled(2)
@pytest.mark.parametrize("kind", CASES)
def test_quantised_checkpoint_is_its_twin_without_codes(kind: str) -> None:
    if not is_known(kind):
        pytest.skip(f"this version of transformers has no {kind}")
    assert check_encodings(kind, logits) == CASES[kind]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_every_encoding_has_a_layout(encoding: str) -> None:
    assert layouts_of(encoding)
