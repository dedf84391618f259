"""RMS norms in one kernel, interpreted on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("triton")

from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.granitemoehybrid.modeling_granitemoehybrid import (
    GraniteMoeHybridRMSNormGated,
)
from transformers.models.olmoe.modeling_olmoe import OlmoeRMSNorm
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNormGated

from runtime.cuda.decode.fused_forward import FusedForward, fused_norm
from tests.helpers import interpreter

interpreter.mend()


def _with_weights(norm: nn.Module) -> nn.Module:
    torch.manual_seed(1)
    for weight in norm.parameters():
        weight.data.uniform_(0.3, 2.0)
    return norm.to(torch.bfloat16)


@pytest.mark.parametrize("kind", [OlmoeRMSNorm, GptOssRMSNorm])
def test_fused_norms_equal_the_modules_own_whenever_they_round(kind: type) -> None:
    norm = _with_weights(kind(96))
    x = torch.randn(50, 1, 96).bfloat16()
    fused = fused_norm(norm)
    assert fused is not None
    assert torch.equal(fused(x), norm(x))


def test_norms_that_compute_anything_else_are_left_alone() -> None:
    assert fused_norm(_with_weights(GemmaRMSNorm(96))) is None
    assert fused_norm(_with_weights(nn.LayerNorm(96))) is None
    assert fused_norm(_with_weights(GraniteMoeHybridRMSNormGated(96, 96))) is None
    assert fused_norm(_with_weights(Qwen3NextRMSNormGated(96))) is None


def test_modules_have_their_own_forward_again_after_a_call() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = _with_weights(OlmoeRMSNorm(96))
            self.seen = False

        def forward(self, x: Tensor) -> Tensor:
            self.seen = "forward" in self.norm.__dict__
            if len(x) > 3:
                raise RuntimeError("too long")
            y: Tensor = self.norm(x)
            return y

    model = Model()
    forward = FusedForward(model)
    forward(torch.randn(3, 96).bfloat16())
    assert model.seen
    assert "forward" not in model.norm.__dict__
    with pytest.raises(RuntimeError):
        forward(torch.randn(4, 96).bfloat16())
    assert "forward" not in model.norm.__dict__
