"""exports.train_moe: tokens, architectures, optimizers, and the mistakes that it names."""

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from exports.mixed_precision import bfloat16_experts
from exports.routing_metrics import (
    RouterTap,
    balance_loss,
    expert_shares,
    next_token_loss,
    previous_token_overlap,
    usage_entropy,
)
from exports.token_stream import TokenStream, tokenise_folder
from exports.train_moe import (
    main,
    new_optimizer,
    rate_at,
    training_windows,
    untrained_model,
)
from exports.train_settings import TrainSettings
from routing.cli import run
from routing.inspect_model import topology_of
from tests.helpers.tracing import trace

TINY = TrainSettings(
    tokens=Path("."),
    vocab_size=300,
    hidden_size=32,
    num_layers=2,
    num_heads=2,
    num_experts=4,
    top_k=2,
    expert_size=8,
    context=32,
    batch=4,
    steps=6,
)
ARCHITECTURES = {
    "qwen3_moe": TINY,
    "qwen2_moe": replace(TINY, architecture="qwen2_moe", shared_expert_size=16),
    "olmoe": replace(TINY, architecture="olmoe", num_experts=6),
    "switch-style": replace(TINY, architecture="olmoe", top_k=1),
}
"""One architecture for every way to weigh and to share experts."""


def write_domain(folder, name, documents):
    folder.mkdir(parents=True, exist_ok=True)
    text = "".join(f"{document}\n<|endoftext|>\n" for document in documents)
    (folder / f"{name}.txt").write_text(text, encoding="utf-8")


@pytest.fixture
def text(tmp_path):
    folder = tmp_path / "text"
    sums = [f"{i} plus {i} is {2 * i}.\n\nSo it is." for i in range(60)]
    birds = [f"Bird {i} sings before bird {i + 1}, naïvely." for i in range(60)]
    write_domain(folder, "sums", sums)
    write_domain(folder, "birds", birds)
    write_domain(folder / "val", "sums", ["7 plus 7 is 14.\n\nSo it is.", "90 plus 90 is 180."])
    write_domain(folder / "val", "birds", ["Bird 90 sings before bird 91."])
    return folder


def tokenise(text, exclude=()):
    return tokenise_folder(
        text,
        domains=["birds", "sums"],
        exclude=list(exclude),
        vocab_size=300,
        tokens_per_domain=10_000,
        seed=0,
    )


def test_training_saves_a_model_of_the_requested_topology_that_transformers_loads(text, tmp_path):
    out = tmp_path / "model"
    main(replace(TINY, text=text, tokens=None, out=out))
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(out)
    stack = topology_of(model, tokenizer).stack()
    assert (stack.num_layers, stack.num_experts, stack.top_k) == (2, 4, 2)
    assert model.config.tie_word_embeddings
    ids = tokenizer("Bird 3 sings", return_tensors="pt").input_ids
    generated = model.generate(ids, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert generated.shape[1] == ids.shape[1] + 5
    record = json.loads((out / "training.json").read_text())
    assert set(record["held_out"]["loss"]) == {"birds", "sums"}
    assert all(math.isfinite(loss) for loss in record["held_out"]["loss"].values())
    assert [entry["step"] for entry in record["history"]] == list(range(TINY.steps))


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_every_architecture_trains_and_is_traced_as_it_was_saved(kind, text, tmp_path):
    settings = replace(ARCHITECTURES[kind], text=text, tokens=None, out=tmp_path / "model", steps=2)
    main(settings)
    documents = trace(tmp_path / "model", text / "sums.txt", tmp_path / "trace")
    assert len(documents) == 60
    shape = (settings.num_layers, settings.top_k)
    assert {document.experts_TLK.shape[1:] for document in documents} == {shape}
    assert max(int(document.experts_TLK.max()) for document in documents) < settings.num_experts
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32)
    assert model.config.model_type == settings.architecture
    tap = RouterTap(model)
    model(torch.from_numpy(documents[0].token_ids_T[None].astype("int64")))
    assert len(tap.experts) == settings.num_layers
    record = json.loads((tmp_path / "model" / "training.json").read_text())
    assert record["settings"]["architecture"] == settings.architecture
    assert 0 < min(record["held_out"]["usage_entropy"]) <= 1


def test_a_shared_expert_sees_every_token_and_is_not_in_the_topology(text):
    model = untrained_model(ARCHITECTURES["qwen2_moe"], tokenise(text))
    rows = []
    shared = model.model.layers[0].mlp.shared_expert
    shared.register_forward_hook(lambda _, args, __: rows.append(args[0].numel()))
    model(torch.arange(12).reshape(2, 6))
    assert rows == [12 * TINY.hidden_size]
    assert shared.up_proj.out_features == 16
    assert topology_of(model).stack().num_experts == TINY.num_experts


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_the_text_alone_teaches_every_router(kind, text):
    stream = tokenise(text)
    model = untrained_model(ARCHITECTURES[kind], stream)
    windows_BT = next(training_windows(stream, TINY, torch.device("cpu")))
    next_token_loss(model, RouterTap(model), windows_BT).backward()
    for layer in model.model.layers:
        assert layer.mlp.gate.weight.grad.abs().max() > 1e-9


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ({"architecture": "qwen2_moe"}, "needs a --shared_expert_size"),
        ({"shared_expert_size": 8}, "no other architecture has one"),
        ({"top_k": 1}, "take --architecture olmoe"),
    ],
)
def test_a_shape_that_the_architecture_does_not_have_is_refused(shape, message):
    with pytest.raises(ValueError, match=message):
        replace(TINY, **shape)


@pytest.mark.parametrize(("optimizer", "steps"), [("adamw", 60), ("muon", 30)])
def test_training_lowers_the_loss(optimizer, steps, text, tmp_path):
    settings = replace(TINY, optimizer=optimizer, steps=steps, learning_rate=1e-2)
    out = tmp_path / "model"
    main(replace(settings, text=text, tokens=None, out=out))
    history = json.loads((out / "training.json").read_text())["history"]
    assert history[-1]["loss"] < history[0]["loss"] - 1


def test_muon_moves_every_matrix_but_embeddings_and_routers(text):
    model = untrained_model(TINY, tokenise(text))
    groups = new_optimizer(model, replace(TINY, optimizer="muon")).param_groups
    names = {id(p): name for name, p in model.named_parameters()}
    muon = {names[id(p)] for group in groups if group["kind"] == "muon" for p in group["params"]}
    layer = "model.layers.0"
    assert f"{layer}.mlp.experts.gate_up_proj" in muon
    assert f"{layer}.self_attn.q_proj.weight" in muon
    assert not muon & {f"{layer}.mlp.gate.weight", "model.embed_tokens.weight"}
    assert sum(len(group["params"]) for group in groups) == len(names)


def test_text_tokenised_in_one_run_is_trained_on_in_another(text, tmp_path):
    tokens, out = tmp_path / "tokens", tmp_path / "model"
    main(replace(TINY, text=text, tokens=tokens, out=None))
    main(replace(TINY, text=None, tokens=tokens, out=out, steps=1))
    assert (out / "model.safetensors").is_file()


def test_held_out_and_excluded_documents_are_never_trained_on(text, tmp_path):
    write_domain(tmp_path / "sample", "anything", ["Bird 5 sings before bird 6, naïvely."])
    stream = tokenise(text, [tmp_path / "sample"])
    trained = stream.tokenizer.decode(stream.train_N.tolist(), skip_special_tokens=False)
    documents = trained.split("<|endoftext|>")
    assert "Bird 5 sings before bird 6, naïvely." not in documents
    assert "7 plus 7 is 14.\n\nSo it is." not in documents
    assert "Bird 4 sings before bird 5, naïvely." in documents
    assert [stream.counts[name]["left_out"] for name in ("birds", "sums")] == [1, 1]
    assert len(documents) == 118 + 1


def test_a_token_stream_survives_saving(text, tmp_path):
    stream = tokenise(text)
    stream.save(tmp_path / "tokens")
    loaded = TokenStream.load(tmp_path / "tokens")
    assert (loaded.train_N == stream.train_N).all()
    assert set(loaded.val) == {"birds", "sums"}
    assert loaded.counts == stream.counts
    assert loaded.tokenizer.to_str() == stream.tokenizer.to_str()


def test_training_windows_are_pieces_of_the_stream(text):
    stream = tokenise(text)
    windows_BT = next(training_windows(stream, TINY, torch.device("cpu")))
    joined = ",".join(map(str, stream.train_N.tolist()))
    assert windows_BT.shape == (TINY.batch, TINY.context + 1)
    assert all(",".join(map(str, window.tolist())) in joined for window in windows_BT)


def test_experts_in_bfloat16_leave_float32_weights_with_float32_gradients(text):
    stream = tokenise(text)
    model = untrained_model(TINY, stream)
    weight = model.model.layers[0].mlp.experts.down_proj
    windows_BT = next(training_windows(stream, TINY, torch.device("cpu")))
    with bfloat16_experts(model, enabled=True), torch.autocast("cpu", torch.bfloat16):
        assert model.model.layers[0].mlp.experts.down_proj.dtype == torch.bfloat16
        next_token_loss(model, RouterTap(model), windows_BT).backward()
    assert model.model.layers[0].mlp.experts.down_proj is weight
    assert weight.dtype == weight.grad.dtype == torch.float32
    assert weight.grad.abs().sum() > 0


def test_the_balance_loss_is_one_when_even_and_top_heavy_routing_costs_more():
    even_TK = torch.arange(8).reshape(4, 2) % 4
    assert balance_loss(torch.zeros(4, 4), even_TK).item() == pytest.approx(1)
    crowded_TE = torch.tensor([[9.0, 9.0, 0.0, 0.0]]).repeat(4, 1)
    crowded = balance_loss(crowded_TE, torch.tensor([[0, 1]]).repeat(4, 1))
    assert crowded.item() == pytest.approx(2, abs=1e-3)


def test_routing_figures_on_routes_worked_out_by_hand():
    experts_BTK = torch.tensor([[[0, 1], [1, 2], [3, 0]], [[2, 3], [3, 2], [2, 3]]])
    assert previous_token_overlap(experts_BTK).item() == pytest.approx((1 + 0 + 2 + 2) / 8)
    shares_E = expert_shares(experts_BTK.flatten(0, 1), 4)
    assert (shares_E * 12).tolist() == pytest.approx([2, 2, 4, 4])
    entropies = usage_entropy(torch.tensor([[0.25] * 4, [1.0, 0, 0, 0]]))
    assert entropies.tolist() == pytest.approx([1, 0])


def test_the_learning_rate_rises_then_falls():
    rates = [rate_at(progress / 100) for progress in range(101)]
    assert rates[0] == 0
    assert rates.index(max(rates)) == 2
    assert rates[2:] == sorted(rates[2:], reverse=True)
    assert rates[-1] == pytest.approx(0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to train on"),
        (["--text", "missing", "--out", "model"], "has no .txt files"),
        (["--text", "missing"], "nothing to write"),
        (["--tokens", "missing", "--out", "model"], "missing"),
    ],
)
def test_a_command_line_that_cannot_work_ends_in_one_line(arguments, message, capsys, tmp_path):
    paths = [str(tmp_path / word) if word in ("missing", "model") else word for word in arguments]
    with pytest.raises(SystemExit) as exit_:
        run(main, TrainSettings, paths, prog="train_moe")
    assert exit_.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "model").exists()
