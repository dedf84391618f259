"""The upcycled layer: at first the dense model, then the Mixtral checkpoint that is written."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from exports.smol.checkpoint import mixture
from exports.smol.differences import differences_of, pack, put_into, unpack
from exports.smol.layer import upcycle
from exports.smol.losses import information, mean_balance, token_losses
from exports.smol.routers import discriminants, start_routers
from exports.smol.settings import Experts

SHAPE = Experts(num_experts=4, top_k=2, rank=2)


def dense_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=24, intermediate_size=40, num_hidden_layers=2,
        num_attention_heads=3, num_key_value_heads=1, head_dim=8, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 50_000.0},
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def text(batch: int = 3, length: int = 17) -> torch.Tensor:
    return torch.randint(64, (batch, length), generator=torch.Generator().manual_seed(1))


def trained(dense: LlamaForCausalLM):
    """An upcycled copy with differences and routers that matter."""
    model = copy.deepcopy(dense)
    blocks = upcycle(model, SHAPE)
    generator = torch.Generator().manual_seed(2)
    for block in blocks:
        for parameter in [block.router, *block.pairs.values()]:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    return model, blocks


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=text()).logits


def test_without_differences_the_mixture_is_the_dense_model():
    dense = dense_model()
    model = copy.deepcopy(dense)
    blocks = upcycle(model, SHAPE)
    start_routers(model, blocks, text(), torch.tensor([0, 1, 1]), seed=0)
    assert all(block.router.abs().max() > 0 for block in blocks)
    torch.testing.assert_close(logits(model), logits(dense))


def test_the_checkpoint_computes_what_was_trained():
    dense = dense_model()
    model, blocks = trained(dense)
    written = mixture(dense, differences_of(blocks, "0" * 64), torch.float32)
    assert written.config.model_type == "mixtral"
    torch.testing.assert_close(logits(written), logits(model), atol=2e-4, rtol=1e-3)
    assert (logits(written) - logits(dense)).abs().max() > 0.05


def test_the_dense_model_stays_as_it_was():
    dense = dense_model()
    before = logits(dense)
    mixture(dense, differences_of(trained(dense)[1], "0" * 64))
    torch.testing.assert_close(logits(dense), before, atol=0, rtol=0)
    model, _ = trained(dense)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert all(".router" in name or ".pairs." in name for name in learning)
    assert len(learning) == 2 * (1 + 6)


def test_packing_keeps_the_logits_to_the_rounding_of_int8(tmp_path):
    model, blocks = trained(dense_model())
    before = logits(model)
    pack(differences_of(blocks, "ab" * 32), tmp_path / "differences.safetensors")
    kept = unpack(tmp_path / "differences.safetensors")
    assert kept.experts == SHAPE and kept.dense_sha256 == "ab" * 32
    put_into(kept, blocks)
    assert 0 < (logits(model) - before).abs().mean() < 0.01


def test_every_pair_of_vectors_is_within_half_a_step_of_its_scale(tmp_path):
    _, blocks = trained(dense_model())
    found = differences_of(blocks, "")
    pack(found, tmp_path / "d.safetensors")
    for name, codes in unpack(tmp_path / "d.safetensors").pairs.items():
        along = 2 if name.endswith("_in") else 1
        step = found.pairs[name].abs().amax(along, keepdim=True) / 127
        assert ((codes - found.pairs[name]).abs() <= step / 2 + 1e-6).all()


@pytest.mark.parametrize("content", [None, b"not safetensors"])
def test_a_file_that_is_missing_or_damaged_is_named(tmp_path, content):
    path = tmp_path / "d.safetensors"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=r"d\.safetensors"):
        unpack(path)


def test_differences_of_another_model_are_refused():
    config = LlamaConfig(
        vocab_size=64, hidden_size=24, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=3, num_key_value_heads=1, tie_word_embeddings=True,
    )  # fmt: skip
    differences = differences_of(trained(dense_model())[1], "")
    with pytest.raises(ValueError, match="belong together"):
        mixture(LlamaForCausalLM(config), differences)


# ---------------------------------------------------------------------- losses and routers
def test_losses_are_those_of_the_whole_vocabulary(monkeypatch):
    monkeypatch.setattr("exports.smol.losses.CHUNK", 4)
    generator = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(10, 6, generator=generator) for _ in range(2))
    head, targets = torch.randn(9, 6, generator=generator), torch.arange(10) % 9
    student.requires_grad_(True)
    entropy, divergence = token_losses(student, teacher, head, targets)
    own, other = ((x @ head.T).log_softmax(-1) for x in (student, teacher))
    torch.testing.assert_close(entropy, -own[torch.arange(10), targets])
    torch.testing.assert_close(divergence, (other.exp() * (other - own)).sum(-1))
    (divergence.sum() + entropy.sum()).backward()
    assert student.grad is not None and student.grad.abs().max() > 0
    assert token_losses(teacher, teacher, head, targets)[1].abs().max() < 1e-6


def test_information_is_zero_for_equal_and_ln_e_for_separate_domains():
    domains = torch.tensor([0, 1, 2, 3, 3])
    apart = 100 * torch.eye(4)[domains].repeat_interleave(6, 0)
    assert information(torch.zeros(30, 4), domains).item() == pytest.approx(0, abs=1e-6)
    assert information(apart + 1e-3, domains).item() == pytest.approx(math.log(4), abs=1e-3)


def test_discriminants_tell_domains_apart_and_favour_no_expert():
    generator = torch.Generator().manual_seed(0)
    domains = torch.arange(6).repeat_interleave(4)
    centres = torch.randn(6, 16, generator=generator)
    states = 5 + centres[domains][:, None] + 0.3 * torch.randn(24, 30, 16, generator=generator)
    weight = discriminants(states, domains, 4, generator)
    logits_NE = states.flatten(0, 1) @ weight.T
    assert logits_NE.mean(0).abs().max() < 0.01
    assert logits_NE.std(0) == pytest.approx(torch.full((4,), 1.5), rel=0.01)
    assert information(logits_NE, domains) > 0.3


def test_the_balance_loss_evens_out_the_experts():
    model, blocks = trained(dense_model())
    for block in blocks:
        block.router.data[0] *= 6
    logits(model)
    routers = [block.router for block in blocks]
    optimizer = torch.optim.Adam(routers, lr=0.05)
    before = None
    for _ in range(30):
        model.model(input_ids=text(8, 32))
        loss = mean_balance(blocks)
        before = loss.item() if before is None else before
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < before - 0.05
