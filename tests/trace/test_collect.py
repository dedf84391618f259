"""trace.collect: the recorded documents, routes and weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from routing.layers import find_moe_layers
from routing.shards import GENERATED, PROMPT, TraceReader, signed_experts
from routing.topology import NO_EXPERT
from tests.helpers.quantised import write_quantised
from tests.helpers.tiny import KINDS, save_tiny
from tests.helpers.tracing import (
    TEXTS,
    Directory,
    assert_same_documents,
    decode,
    trace,
    write_texts,
)
from trace.models import load_model
from trace.settings import CollectSettings

CAUSAL = [kind for kind in KINDS if kind != "switch_transformers"]


def routers_decisions(
    directory: Path, stack: str = "decoder", **inputs: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Ids [T, L, K] and weights that the routers of a stack return for one unpadded document."""
    encoder_decoder = "decoder_input_ids" in inputs
    auto: Any = AutoModelForSeq2SeqLM if encoder_decoder else AutoModelForCausalLM
    model = auto.from_pretrained(directory).eval()
    outputs: list[tuple[torch.Tensor, ...]] = []
    for layer in find_moe_layers(model):
        if layer.stack == stack:
            block = model.get_submodule(layer.name.rpartition(".")[0])
            router = block.router if encoder_decoder else block.gate
            router.register_forward_hook(lambda _, __, output: outputs.append(output))
    with torch.inference_mode():
        model(**{name: torch.tensor([ids]) for name, ids in inputs.items()})
    if encoder_decoder:
        onehots = [next(t for t in output if not t.is_floating_point()) for output in outputs]
        chosen = [onehot.flatten(0, -2) for onehot in onehots]
        ids_TL = [torch.where(c.sum(-1) > 0, c.argmax(-1), NO_EXPERT) for c in chosen]
        return torch.stack(ids_TL, 1)[..., None].numpy(), np.empty(0)
    return (
        torch.stack([output[2] for output in outputs], 1).numpy(),
        torch.stack([output[1] for output in outputs], 1).float().numpy(),
    )


@pytest.mark.parametrize("kind", CAUSAL)
def test_recorded_experts_are_the_routers_own_decisions(
    kind: str, tiny_directory: Directory, data: Path, tmp_path: Path
) -> None:
    documents = trace(tiny_directory(kind), data, tmp_path / "out", weights=True)
    assert len(documents) == len(TEXTS)
    for document in documents:
        ids_TLK, weights_TLK = routers_decisions(
            tiny_directory(kind), input_ids=document.token_ids_T.tolist()
        )
        assert np.array_equal(signed_experts(document.experts_TLK, 8), ids_TLK)
        assert document.weights_TLK is not None
        np.testing.assert_allclose(document.weights_TLK, weights_TLK, atol=1e-3)


def test_documents_keep_their_order_and_hold_no_padding(
    tiny_directory: Directory, data: Path, tmp_path: Path
) -> None:
    documents = trace(tiny_directory("olmoe"), data, tmp_path / "out")
    assert [decode(document.token_ids_T) for document in documents] == TEXTS
    assert {document.label for document in documents} == {"letters"}
    assert all((document.phase_T == PROMPT).all() for document in documents)


def test_the_batch_size_does_not_change_the_trace(
    tiny_directory: Directory, data: Path, tmp_path: Path
) -> None:
    one_by_one = trace(tiny_directory("mixtral"), data, tmp_path / "a", batch_tokens=1)
    together = trace(tiny_directory("mixtral"), data, tmp_path / "b", batch_tokens=4096)
    assert_same_documents(one_by_one, together)


@pytest.mark.parametrize("kind", CAUSAL)
def test_generated_tokens_follow_the_prompt_with_their_routes(
    kind: str, tiny_directory: Directory, data: Path, tmp_path: Path
) -> None:
    documents = trace(tiny_directory(kind), data, tmp_path / "out", generate=6)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_directory(kind))
    for document, text in zip(documents, TEXTS, strict=True):
        prompt = document.token_ids_T[document.phase_T == PROMPT]
        assert decode(prompt) == text
        alone = model.generate(torch.tensor(prompt[None]).long(), max_new_tokens=6, do_sample=False)
        assert document.token_ids_T.tolist() == alone[0, :-1].tolist()
        assert (document.phase_T[len(prompt) :] == GENERATED).all()
        ids_TLK, _ = routers_decisions(
            tiny_directory(kind), input_ids=document.token_ids_T.tolist()
        )
        assert np.array_equal(signed_experts(document.experts_TLK, 8), ids_TLK)


def test_encoder_and_decoder_are_traced_apart(tmp_path: Path, data: Path) -> None:
    model = save_tiny(tmp_path / "model", "switch_transformers", expert_capacity=512)
    decoders = trace(model, data, tmp_path / "out", generate=5)
    encoders = list(TraceReader(tmp_path / "out", "encoder").documents())
    assert len(encoders) == len(decoders) == len(TEXTS)
    for encoder, decoder, text in zip(encoders, decoders, TEXTS, strict=True):
        assert decode(encoder.token_ids_T) == text
        assert decoder.phase_T.tolist() == [PROMPT, *[GENERATED] * (len(decoder.phase_T) - 1)]
        for stack, document in (("encoder", encoder), ("decoder", decoder)):
            ids_TLK, _ = routers_decisions(
                model,
                stack,
                input_ids=encoder.token_ids_T.tolist(),
                decoder_input_ids=decoder.token_ids_T.tolist(),
            )
            assert np.array_equal(signed_experts(document.experts_TLK, 8), ids_TLK)


def test_tokens_dropped_by_capacity_have_no_expert(
    tiny_directory: Directory, data: Path, tmp_path: Path
) -> None:
    trace(tiny_directory("switch_transformers"), data, tmp_path / "out", generate=2)
    dropped = 0
    for encoder in TraceReader(tmp_path / "out", "encoder").documents():
        ids_TLK, _ = routers_decisions(
            tiny_directory("switch_transformers"),
            "encoder",
            input_ids=encoder.token_ids_T.tolist(),
            decoder_input_ids=[0],
        )
        assert np.array_equal(signed_experts(encoder.experts_TLK, 8), ids_TLK)
        dropped += int((ids_TLK == NO_EXPERT).sum())
    if not dropped:
        pytest.skip("this version of transformers does not enforce the experts' capacity")


def test_an_answer_ends_before_its_end_token(
    tiny_directory: Directory, data: Path, tmp_path: Path
) -> None:
    whole = trace(tiny_directory("olmoe"), data, tmp_path / "whole", generate=8)
    answers = [d.token_ids_T[d.phase_T == GENERATED].tolist() for d in whole]
    end = answers[0][3]
    model = save_tiny(tmp_path / "model", "olmoe", eos_token_id=end)
    ended = trace(model, data, tmp_path / "ended", generate=8)
    for document, answer in zip(ended, answers, strict=True):
        expected = answer[: answer.index(end)] if end in answer else answer
        assert document.token_ids_T[document.phase_T == GENERATED].tolist() == expected
    assert sum(len(d.token_ids_T) for d in ended) < sum(len(d.token_ids_T) for d in whole)


def test_sampling_repeats_with_its_seed(
    tiny_directory: Directory, data: Path, tmp_path: Path
) -> None:
    options = {"generate": 6, "sample": True}
    one, same, other = (
        trace(tiny_directory("qwen3_moe"), data, tmp_path / name, seed=seed, **options)
        for name, seed in (("one", 1), ("same", 1), ("other", 2))
    )
    assert_same_documents(one, same)
    assert [d.token_ids_T.tolist() for d in one] != [d.token_ids_T.tolist() for d in other]


def test_a_long_document_is_cut_and_the_cut_is_reported(
    tiny_directory: Directory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_texts(tmp_path / "long.txt", ["z" * 300, "short"])
    documents = trace(tiny_directory("olmoe"), data, tmp_path / "out", generate=10)
    prompts = [int((d.phase_T == PROMPT).sum()) for d in documents]
    assert prompts == [246, 5]  # the context of 256 tokens, less those to generate
    assert "documents cut to fit: 1, by 55 tokens in all" in capsys.readouterr().out


def test_a_quantised_model_is_traced_as_its_unquantised_twin(data: Path, tmp_path: Path) -> None:
    plain = save_tiny(tmp_path / "plain", "qwen3_moe", dtype="bfloat16")
    twin = tmp_path / "twin"
    quantised = write_quantised(plain, tmp_path / "quantised", "fp8 one scale", twin=twin)
    model = load_model(CollectSettings(model=str(quantised), dataset=["-"], out="-"))
    assert not hasattr(model.config, "quantization_config")
    theirs, ours = (trace(path, data, tmp_path / path.stem[0]) for path in (twin, quantised))
    assert_same_documents(ours, theirs)


def test_a_quantisation_that_cannot_be_undone_is_refused_by_name(tmp_path: Path) -> None:
    config = json.loads((save_tiny(tmp_path, "olmoe") / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"the quantisation gptq.*take the model's unquantised"):
        load_model(CollectSettings(model=str(tmp_path), dataset=["-"], out="-"))
