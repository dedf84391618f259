"""Training from the command line: it learns the rules, resumes, and names the user's mistakes."""

from __future__ import annotations

import csv
import json
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from predictor.networks.windows import Windows
from predictor.training.calibration import calibrate, fit_affine
from predictor.training.checkpoint import Trained, load_checkpoint
from predictor.training.data import TraceData
from predictor.training.losses import hide_routes
from routing.predictor_file.format import HEADS
from routing.process.output_lock import OutputLock
from routing.topology import NO_EXPERT
from tests.helpers.predicting import TOPOLOGY, random_windows, tiny_predictor, train, write_trace

EPOCHS = 40


@pytest.fixture(scope="module")
def trace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_trace(tmp_path_factory.mktemp("trace") / "rules", num_documents=150)


@pytest.fixture(scope="module")
def run(trace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("run")
    train(trace, out, f"--trainer.max_epochs={EPOCHS}", "--early_stopping.patience=100")
    return out


@pytest.fixture(scope="module")
def trained(run: Path) -> Trained:
    return load_checkpoint(run / "predictor.ckpt")


def test_it_learns_rules_of_tokens_and_of_context_on_documents_it_never_saw(trained):
    token, before, secret = trained.metrics["this_known"]["recall"]
    assert min(token, before) > 0.99
    assert secret > 0.9


def test_two_trainings_cannot_write_to_one_directory(
    trace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with OutputLock(tmp_path / "run"), pytest.raises(SystemExit):
        train(trace, tmp_path / "run", "--trainer.max_epochs=1")
    assert "is being written by process" in capsys.readouterr().err
    assert not list(tmp_path.glob("run/*.csv"))
    train(trace, tmp_path / "run", "--trainer.max_epochs=1")


def test_what_only_history_tells_is_unknown_without_it(trained):
    token, before, secret = trained.metrics["this_unknown"]["recall"]
    assert min(token, before) > 0.95
    assert secret < 0.5


def test_the_next_head_predicts_what_this_token_tells_about_the_next(trained):
    token, before, secret = trained.metrics["next_known"]["recall"]
    assert token < 0.5, "the next token is random"
    assert before > 0.99 and secret > 0.9


def test_probabilities_are_calibrated_on_held_out_documents(trained):
    for head in HEADS:
        assert max(trained.metrics[f"{head}_known"]["calibration_error"]) < 0.06


def test_the_run_leaves_logs_curves_and_checkpoints(run):
    with open(run / "metrics.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    validated = [row for row in rows if row["val/loss"]]
    assert len(validated) == EPOCHS
    assert float(validated[-1]["val/loss"]) < float(validated[0]["val/loss"]) / 2
    assert sum(bool(row["test/recall"]) for row in rows) == 1
    assert (run / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert list(run.rglob("events.out.tfevents*")) and list(run.rglob("last.ckpt"))


def test_the_checkpoint_holds_weights_and_json_only(run, trained):
    content = torch.load(run / "predictor.ckpt", weights_only=True)
    meta = json.loads(content["expertflow"])
    assert meta["kind"] == "causal" and meta["window"] == 8 and meta["horizon"] == 2
    assert "optimizer_states" not in content
    assert trained.topology == TOPOLOGY
    assert trained.provenance["traces"] == [{"seed": 0}]


def test_the_checkpoint_is_calibrated(trained):
    predictor = trained.predictor
    pairs = torch.stack([predictor.scale_J, predictor.shift_J], 1)
    assert ((pairs[:, 0] - 1).abs() > 1e-4).all()
    assert dict(zip(HEADS, pairs.tolist(), strict=True)) == trained.provenance["calibration"]


def test_the_best_weights_are_kept_not_the_last(trace, tmp_path):
    train(trace, tmp_path, "--trainer.max_epochs=3", "--checkpoint.mode=max")
    (best,) = tmp_path.rglob("epoch=0*.ckpt")
    kept = torch.load(tmp_path / "predictor.ckpt", weights_only=True)["state_dict"]
    for name, tensor in torch.load(best, weights_only=True)["state_dict"].items():
        if name not in ("predictor.scale_J", "predictor.shift_J"):
            assert torch.equal(kept[name], tensor), name


def test_a_loaded_checkpoint_predicts_with_the_reported_recall(trace, trained):
    data = TraceData(
        [str(trace)], window=8, horizon=2, row_tokens=64, val_fraction=0.15, test_fraction=0.15
    )
    hits = used = 0
    for batch in data.test_dataloader():
        with torch.no_grad():
            logits_NE = trained.predictor(batch).this_BTLE[batch.valid_BT][:, 0]
        experts_NK = batch.experts_BTLK[batch.valid_BT][:, 0].long()
        best_NE = torch.zeros_like(logits_NE).scatter(1, logits_NE.topk(2).indices, 1.0)
        hits += int(best_NE.gather(1, experts_NK).sum())
        used += experts_NK.numel()
    assert hits / used == pytest.approx(trained.metrics["this_known"]["recall"][0], abs=1e-6)


def test_an_interrupted_run_resumes_from_its_last_checkpoint(trace, tmp_path, run):
    train(trace, tmp_path, "--trainer.max_epochs=2")
    (last,) = tmp_path.rglob("last.ckpt")
    steps = torch.load(last, weights_only=True)["global_step"]
    train(trace, tmp_path / "on", "--trainer.max_epochs=3", f"--ckpt_path={last}")
    (later,) = (tmp_path / "on").rglob("last.ckpt")
    resumed = torch.load(later, weights_only=True)
    assert resumed["global_step"] == steps * 3 // 2
    assert resumed["epoch"] == 2


def test_the_learning_rate_falls_to_nothing_within_the_time_of_a_run(trace, tmp_path):
    train(trace, tmp_path, "--trainer.max_epochs=10000", "--trainer.max_time=00:00:00:02")
    (last,) = tmp_path.rglob("last.ckpt")
    (schedule,) = torch.load(last, weights_only=True)["lr_schedulers"]
    assert schedule["_last_lr"][0] < 0.05 * schedule["base_lrs"][0]


def test_training_can_start_from_a_finished_predictor(trace, tmp_path, run):
    start = run / "predictor.ckpt"
    options = ("--trainer.max_steps=1", "--model.learning_rate=1e-9", f"--start_from={start}")
    after = load_checkpoint(train(trace, tmp_path, *options))
    before = load_checkpoint(start)
    for name, weight in before.predictor.named_parameters():
        torch.testing.assert_close(after.predictor.get_parameter(name), weight, atol=1e-6, rtol=0)
    assert after.provenance["started_from"] == before.provenance


def test_training_cannot_start_from_a_predictor_of_other_sizes(trace, tmp_path, capsys, run):
    start = f"--start_from={run / 'predictor.ckpt'}"
    said = fails(capsys, trace, tmp_path, start, "--model.predictor.width=32")
    assert "settings" in said and said.count("\n") == 1


def test_the_embedding_can_start_from_the_traced_models(trace, tmp_path):
    from safetensors.torch import save_file

    model = tmp_path / "model"
    model.mkdir()
    save_file({"embed_tokens.weight": torch.randn(12, 20)}, model / "model.safetensors")
    out = tmp_path / "run"
    options = ("--trainer.max_steps=1", "--model.learning_rate=1e-9")
    checkpoint = train(trace, out, f"--model.embedding_from={model}", *options)
    embedding = load_checkpoint(checkpoint).predictor.embedding_VR.weight
    assert (embedding.T @ embedding).fill_diagonal_(0).abs().max() < 1e-2, "columns of an SVD"


def fails(capsys: pytest.CaptureFixture[str], trace: Path, out: Path, *options: str) -> str:
    """The command line's message on stderr when it refuses."""
    with pytest.raises(SystemExit) as stop:
        train(trace, out, *options)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said
    assert not (out / "predictor.ckpt").exists()
    return said


def test_mistakes_end_in_one_clear_line(trace, tmp_path, capsys):
    said = fails(capsys, tmp_path / "nothing", tmp_path / "out")
    assert said.startswith("python -m predictor.train: error:") and "is not a trace" in said
    other = write_trace(tmp_path / "other", topology=replace(TOPOLOGY, model="fedcba9876543210"))
    said = fails(capsys, trace, tmp_path / "out", f"--data.trace=[{trace},{other}]")
    assert "is for" in said and said.count("\n") == 1
    said = fails(capsys, trace, tmp_path / "out", f"--model.embedding_from={tmp_path}")
    assert "model.safetensors" in said


class Exploit:
    """The content of a hostile checkpoint."""

    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self):
        return (Path.touch, (self.victim,))


def write_foreign(path: Path, kind: str) -> None:
    """Write a file that is not a checkpoint, of one of several kinds."""
    if kind == "text":
        path.write_text("no checkpoint")
    elif kind == "pickle":
        path.write_bytes(pickle.dumps(Exploit(path.with_name("touched"))))
    elif kind == "torch pickle":
        torch.save({"expertflow": Exploit(path.with_name("touched"))}, path)
    elif kind == "foreign":
        torch.save({"state_dict": {"weight": torch.zeros(2)}}, path)
    elif kind == "empty":
        path.write_bytes(b"")


FOREIGN = ["text", "pickle", "torch pickle", "foreign", "empty", "missing"]


@pytest.mark.parametrize("kind", FOREIGN)
def test_a_foreign_checkpoint_is_refused_and_never_unpickled(tmp_path, monkeypatch, kind):
    monkeypatch.delenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", raising=False)
    write_foreign(tmp_path / "x.ckpt", kind)
    with pytest.raises(ValueError, match=r"x\.ckpt"):
        load_checkpoint(tmp_path / "x.ckpt")
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize("kind", FOREIGN)
def test_resuming_from_a_foreign_checkpoint_is_one_clear_line(trace, tmp_path, capsys, kind):
    write_foreign(tmp_path / "x.ckpt", kind)
    said = fails(capsys, trace, tmp_path / "out", f"--ckpt_path={tmp_path / 'x.ckpt'}")
    assert "x.ckpt" in said and said.count("\n") == 1
    assert not (tmp_path / "touched").exists()


def test_a_run_of_other_sizes_or_without_its_optimizer_cannot_resume(trace, run, tmp_path, capsys):
    (last,) = run.rglob("last.ckpt")
    said = fails(capsys, trace, tmp_path, f"--ckpt_path={last}", "--model.predictor.width=32")
    assert "settings" in said and "32" in said and said.count("\n") == 1
    said = fails(capsys, trace, tmp_path, f"--ckpt_path={run / 'predictor.ckpt'}")
    assert "weights only" in said and said.count("\n") == 1


@pytest.mark.parametrize("change", ["truncated", "sizes", "settings"])
def test_a_damaged_checkpoint_is_refused(run, tmp_path, change):
    path = tmp_path / "x.ckpt"
    content = torch.load(run / "predictor.ckpt", weights_only=True)
    if change == "truncated":
        path.write_bytes((run / "predictor.ckpt").read_bytes()[:-3000])
    else:
        meta = json.loads(content["expertflow"])
        meta["settings"] |= {"width": 32} if change == "sizes" else {"colour": "red"}
        torch.save(content | {"expertflow": json.dumps(meta)}, path)
    with pytest.raises(ValueError, match=r"x\.ckpt"):
        load_checkpoint(path)


def test_calibration_undoes_a_scale_and_a_shift_of_the_logits():
    truth = 2 * torch.randn(200_000)
    used = torch.rand(200_000) < truth.sigmoid()
    found = fit_affine((truth - 1) / 3, used)
    assert found.tolist() == pytest.approx([3.0, 1.0], abs=0.05)


def test_calibrating_never_raises_the_cross_entropy_of_any_head():
    predictor = tiny_predictor()
    batches = [random_windows(8, 40) for _ in range(4)]

    def losses() -> list[float]:
        return [
            _cross_entropy(predictor(batch)[head], batch, head)
            for head in range(len(HEADS))
            for batch in batches
        ]

    with torch.no_grad():
        before = losses()
    fitted = calibrate(predictor, batches)
    with torch.no_grad():
        after = losses()
    assert sum(after) < sum(before)
    assert list(fitted) == list(HEADS)
    again = calibrate(predictor, batches)
    assert again["this"] == pytest.approx(fitted["this"], rel=1e-3), "starts from no calibration"


def _cross_entropy(logits_BTLE: torch.Tensor, batch: Windows, head: int) -> float:
    from predictor.networks.targets import targets

    target = targets(batch, tiny_predictor().shape)[head]
    return torch.nn.functional.binary_cross_entropy_with_logits(
        logits_BTLE[target.valid_BT], target.used_BTLE[target.valid_BT].float()
    ).item()


def test_training_hides_history_of_whole_rows_of_beginnings_and_of_single_tokens():
    routes = random_windows(3000, 20).routes_BTLK
    hidden_BT = (hide_routes(routes, 0.5) == NO_EXPERT).flatten(2).all(-1)
    count_B = hidden_BT.sum(1)
    first_B = hidden_BT.long().cumprod(1).sum(1)
    whole, beginning = (count_B == 20), (count_B == first_B) & (count_B > 0) & (count_B < 20)
    scattered = (count_B > 0) & ~whole & ~beginning
    assert (count_B == 0).float().mean().item() == pytest.approx(0.5, abs=0.05)
    for share in (whole, beginning, scattered):
        assert share.float().mean().item() == pytest.approx(1 / 6, abs=0.03)
    assert torch.equal(hide_routes(routes, 0.0), routes)
