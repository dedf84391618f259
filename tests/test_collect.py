"""trace.collect: what it records, from what, and what happens when it is interrupted or refused."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, LlamaConfig, LlamaForCausalLM

from routing.cli import run
from routing.layers import find_moe_layers
from routing.shards import GENERATED, MANIFEST, PROMPT, Document, TraceReader, signed_experts
from routing.topology import NO_EXPERT
from tests.tiny import KINDS, save_tiny, tiny_tokenizer
from trace.batches import batches, padded, windows
from trace.collect import collect
from trace.settings import CollectSettings
from trace.sources import SEPARATOR, Prompt

CAUSAL = [kind for kind in KINDS if kind != "switch_transformers"]
TEXTS = [f"{'documents of many lengths ' * (7 * n % 5)}number {n}" for n in range(12)]
ROOT = Path(__file__).parent.parent

Directory = Callable[[str], Path]


def write_texts(path: Path, texts: list[str]) -> Path:
    path.write_text(f"\n{SEPARATOR}\n".join(texts))
    return path


def trace(model: Path, data: Path, out: Path, **options: Any) -> list[Document]:
    collect(
        CollectSettings(
            model=str(model), dataset=[str(data)], out=str(out), **{"batch_tokens": 512, **options}
        )
    )
    return list(TraceReader(out, verify=True).documents())


def decode(ids_T: np.ndarray) -> str:
    return str(tiny_tokenizer().decode(ids_T)).strip()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_texts(tmp_path / "letters.txt", TEXTS)


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


def assert_same_documents(ours: list[Document], theirs: list[Document]) -> None:
    assert len(ours) == len(theirs)
    for one, other in zip(ours, theirs, strict=True):
        assert one.label == other.label
        for field in ("token_ids_T", "experts_TLK", "phase_T", "weights_TLK"):
            left, right = getattr(one, field), getattr(other, field)
            assert (left is None and right is None) or left.tobytes() == right.tobytes(), field


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


def test_an_interrupted_trace_resumes_without_losing_a_document(
    tiny_directory: Directory,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    one_thread: None,
) -> None:
    texts = [f"{'word ' * (n % 13)}{n}" for n in range(250)]
    data = write_texts(tmp_path / "words.txt", texts)
    options = {"generate": 4, "batch_tokens": 128, "shard_tokens": 1000, "weights": True}
    model, out = tiny_directory("olmoe"), tmp_path / "killed"
    words = {"model": model, "dataset": data, "out": out} | options | {"weights": "true"}
    command = [sys.executable, "-m", "trace.collect"]
    command += [word for name, value in words.items() for word in (f"--{name}", str(value))]
    process = subprocess.Popen(command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"})
    wait_for_a_shard(out, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = len(TraceReader(out, verify=True))
    assert 0 < done < len(texts)
    resumed = trace(model, data, out, **options)
    assert [decode(d.token_ids_T[d.phase_T == PROMPT]) for d in resumed] == texts
    assert f"after {done} documents" in capsys.readouterr().out
    assert_same_documents(resumed, trace(model, data, tmp_path / "whole", **options))


@pytest.fixture
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def wait_for_a_shard(out: Path, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 120
    while not (out / MANIFEST).exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.002)


def test_a_complete_trace_is_left_alone(
    tiny_directory: Directory, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace(tiny_directory("olmoe"), data, tmp_path / "out")
    before = contents(tmp_path / "out")
    trace(tiny_directory("olmoe"), data, tmp_path / "out")
    assert "already complete: 12 documents" in capsys.readouterr().out
    assert contents(tmp_path / "out") == before


def contents(directory: Path) -> dict[str, tuple[bytes, int]]:
    return {p.name: (p.read_bytes(), p.stat().st_mtime_ns) for p in directory.iterdir()}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "mixtral"}, "olmoe .* but this model is for mixtral"),
        ({"max_tokens": 99}, "max_tokens: 2048 there, 99 here"),
        ({"weights": True}, "with_weights"),
    ],
)
def test_a_trace_of_something_else_is_not_appended_to(
    change: dict[str, Any], message: str, tiny_directory: Directory, data: Path, tmp_path: Path
) -> None:
    trace(tiny_directory("olmoe"), data, tmp_path / "out")
    before = contents(tmp_path / "out")
    options = {"model": "olmoe"} | change
    with pytest.raises(ValueError, match=message):
        trace(tiny_directory(options.pop("model")), data, tmp_path / "out", **options)
    assert contents(tmp_path / "out") == before


def test_nan_in_router_weights_names_layer_and_document_and_keeps_the_shards(
    tiny_directory: Directory, tmp_path: Path
) -> None:
    texts = [f"plain text {n}" for n in range(60)]
    texts[40] = "here is a Z"
    model = AutoModelForCausalLM.from_pretrained(tiny_directory("olmoe"))
    token = tiny_tokenizer().convert_tokens_to_ids("Z")
    model.model.embed_tokens.weight.data[token] = float("nan")
    model.save_pretrained(tmp_path / "broken")
    tiny_tokenizer().save_pretrained(tmp_path / "broken")
    data = write_texts(tmp_path / "texts.txt", texts)
    options = {"batch_tokens": 16, "shard_tokens": 64}
    with pytest.raises(ValueError, match=r"NaN in model.layers.0.mlp.experts, in document 40"):
        trace(tmp_path / "broken", data, tmp_path / "out", **options)
    kept = list(TraceReader(tmp_path / "out", verify=True).documents())
    whole = trace(tiny_directory("olmoe"), data, tmp_path / "whole", **options)
    assert 0 < len(kept) <= 40
    assert_same_documents(kept, whole[: len(kept)])


def test_a_long_document_is_cut_and_the_cut_is_told(
    tiny_directory: Directory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_texts(tmp_path / "long.txt", ["z" * 300, "short"])
    documents = trace(tiny_directory("olmoe"), data, tmp_path / "out", generate=10)
    prompts = [int((d.phase_T == PROMPT).sum()) for d in documents]
    assert prompts == [246, 5]  # a context of 256 less the answer
    assert "1 of them were cut to fit: 55 tokens left out" in capsys.readouterr().out


def test_a_model_without_experts_is_refused(data: Path, tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=256, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(tmp_path / "dense")
    tiny_tokenizer().save_pretrained(tmp_path / "dense")
    with pytest.raises(ValueError, match="LlamaForCausalLM has no MoE layers"):
        trace(tmp_path / "dense", data, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_encoder_decoder_model_needs_generate(
    tiny_directory: Directory, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="give --generate N"):
        trace(tiny_directory("switch_transformers"), data, tmp_path / "out")


def test_a_mistake_on_the_command_line_is_one_line(
    tiny_directory: Directory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty.txt").write_text(f"\n{SEPARATOR}\n  \n")
    argv = ["--model", str(tiny_directory("olmoe")), "--out", str(tmp_path / "out")]
    argv += ["--dataset", str(tmp_path / "empty.txt"), "--max_tokens", "9"]
    with pytest.raises(SystemExit) as exit_:
        run(collect, CollectSettings, argv, prog="collect")
    assert exit_.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("collect: error:")
    assert line.endswith("empty.txt: no document with any text")
    assert not (tmp_path / "out").exists()


lengths = st.lists(st.integers(1, 50), min_size=1, max_size=60)


@given(lengths, st.integers(1, 120), st.integers(0, 9))
def test_batches_hold_every_document_once_within_their_budget(
    lengths: list[int], num_tokens: int, answer: int
) -> None:
    prompts = [Prompt(n, [n] * length, "x", 0) for n, length in enumerate(lengths)]
    split = list(windows(prompts, num_tokens))
    assert [prompt for window in split for prompt in window] == prompts
    for window in split:
        cut = list(batches(window, num_tokens, answer=answer))
        assert sorted(p.number for batch in cut for p in batch) == [p.number for p in window]
        for batch in cut:
            width = max(len(prompt.ids) for prompt in batch) + answer
            assert len(batch) == 1 or len(batch) * width <= num_tokens


@given(lengths, st.booleans())
def test_padding_is_masked_and_nothing_else_is(lengths: list[int], left: bool) -> None:
    prompts = [Prompt(n, [n + 1] * length, "x", 0) for n, length in enumerate(lengths)]
    ids_BT, mask_BT = padded(prompts, pad_id=0, left=left)
    assert torch.equal(ids_BT > 0, mask_BT > 0)
    for prompt, ids_T, mask_T in zip(prompts, ids_BT, mask_BT, strict=True):
        assert ids_T[mask_T > 0].tolist() == prompt.ids
        assert bool(mask_T[-1 if left else 0])
