"""Training of a small mixture-of-experts model from scratch, such as `exports/moe-8x32`.

There are two steps, so that the second can run on a machine that has only the tokens:

    python -m exports.train_moe --text TEXT --exclude exports/sample --tokens TOKENS
    python -m exports.train_moe --tokens TOKENS --out MODEL

`--text` and `--out` together do both.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from exports.architecture import new_model
from exports.train_settings import TrainSettings
from routing.cli import run

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from exports.token_stream import TokenStream

WARM_UP = 0.02
"""Share of the training in which the learning rate rises."""
FINAL_RATE = 0.05
"""Last learning rate, over the highest."""
NOT_HIDDEN = ("embed_tokens.weight", "gate.weight")
"""Matrices that are not between hidden states: those of the embedding and the routers."""


def main(settings: TrainSettings) -> None:
    """Tokenise, train, measure and save, as the settings ask for."""
    stream = _stream(settings)
    if settings.out is not None:
        train(settings, stream, settings.out)


def _stream(settings: TrainSettings) -> TokenStream:
    from exports.token_stream import TokenStream, tokenise_folder

    if settings.text is None:
        assert settings.tokens is not None
        return TokenStream.load(settings.tokens)
    names = settings.domains or sorted(path.stem for path in settings.text.glob("*.txt"))
    if not names:
        raise ValueError(f"{settings.text} has no .txt files")
    stream = tokenise_folder(
        settings.text,
        domains=names,
        exclude=settings.exclude,
        vocab_size=settings.vocab_size,
        tokens_per_domain=settings.tokens_per_domain,
        seed=settings.seed,
    )
    for name, counts in stream.counts.items():
        print(name, counts)
    if settings.tokens is not None:
        stream.save(settings.tokens)
    return stream


def train(settings: TrainSettings, stream: TokenStream, out: Path) -> None:
    """Train on `stream`; save model, tokenizer and `training.json` (settings, metrics) in `out`."""
    import torch

    from exports.routing_metrics import RouterTap, measure

    if len(stream.train_N) <= 2 * settings.context:
        raise ValueError(f"only {len(stream.train_N)} tokens to train on: give more text")
    torch.manual_seed(settings.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = untrained_model(settings, stream).to(device)
    tap = RouterTap(model)
    started = time.monotonic()
    history = _fit(model, tap, settings, stream)
    seconds = time.monotonic() - started
    model.to(torch.bfloat16).eval()
    val = validation_windows(stream, settings.context, device)
    figures = measure(model, tap, val, batch=16)
    print(json.dumps(figures), flush=True)
    model.save_pretrained(out)
    _hub_tokenizer(stream, settings.context).save_pretrained(out)
    record = {
        "settings": {k: v for k, v in asdict(settings).items() if not isinstance(v, Path | list)},
        "parameters": sum(p.numel() for p in model.parameters()),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "seconds": round(seconds, 1),
        "text": stream.counts,
        "held_out": figures,
        "history": history,
    }
    (out / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def untrained_model(settings: TrainSettings, stream: TokenStream) -> Any:
    """A model of the shape in `settings` for the tokens of `stream`, its float32 weights random."""
    from exports.token_stream import END_OF_TEXT

    end = stream.tokenizer.token_to_id(END_OF_TEXT)
    model = new_model(
        settings,
        vocab_size=stream.tokenizer.get_vocab_size(),
        router_aux_loss_coef=settings.balance,
        max_position_embeddings=settings.context,
        eos_token_id=end,
        pad_token_id=end,
    )
    model.config._experts_implementation = settings.experts
    return model


def _hub_tokenizer(stream: TokenStream, context: int) -> Any:
    from transformers import PreTrainedTokenizerFast

    from exports.token_stream import END_OF_TEXT

    return PreTrainedTokenizerFast(
        tokenizer_object=stream.tokenizer,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=context,
    )


def _fit(
    model: nn.Module, tap: Any, settings: TrainSettings, stream: TokenStream
) -> list[dict[str, Any]]:
    """Run the steps. Returns the loss over time, about fifty entries."""
    import torch

    from exports.mixed_precision import bfloat16_experts
    from exports.routing_metrics import balance_loss, next_token_loss

    device = next(model.parameters()).device
    optimizer = new_optimizer(model, settings)
    history, started = [], time.monotonic()
    with bfloat16_experts(model, enabled=device.type == "cuda"):
        for step, windows_BT in enumerate(training_windows(stream, settings, device)):
            elapsed = time.monotonic() - started
            progress = max(step / settings.steps, elapsed / (60 * settings.minutes))
            if progress >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = settings.learning_rate * rate_at(progress)
            with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
                loss = next_token_loss(model, tap, windows_BT)
            balance = torch.stack(list(map(balance_loss, tap.logits, tap.experts))).mean()
            (loss + settings.balance * balance).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            if step % max(1, settings.steps // 50) == 0:
                history.append(_log(step, loss, balance, windows_BT, elapsed))
    return history


def _log(
    step: int, loss: Tensor, balance: Tensor, windows_BT: Tensor, elapsed: float
) -> dict[str, Any]:
    if not math.isfinite(loss.item()):
        raise ValueError(f"the loss is {loss.item()} at step {step}: lower --learning_rate")
    entry = {
        "step": step,
        "loss": round(loss.item(), 4),
        "balance": round(balance.item(), 4),
        "seconds": round(elapsed, 1),
    }
    rate = step * windows_BT[:, 1:].numel() / max(elapsed, 1e-9)
    print(json.dumps(entry), f"{rate:,.0f} tok/s", flush=True)
    return entry


def new_optimizer(model: nn.Module, settings: TrainSettings) -> torch.optim.Optimizer:
    """The optimizer of `settings`."""
    import torch

    from predictor.training.optimizer import Muon

    rate, decay = settings.learning_rate, 0.1
    matrices = {name: p for name, p in model.named_parameters() if p.dim() > 1}
    vectors = [p for p in model.parameters() if p.dim() == 1]
    if settings.optimizer == "muon":
        hidden = [p for name, p in matrices.items() if not name.endswith(NOT_HIDDEN)]
        others = [p for name, p in matrices.items() if name.endswith(NOT_HIDDEN)]
        return Muon(hidden, [*others, *vectors], lr=rate, weight_decay=decay)
    groups = [
        {"params": list(matrices.values()), "weight_decay": decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True)


def rate_at(progress: float) -> float:
    """The learning rate over the highest: a linear rise, then a cosine fall.

    Args:
        progress: Share of the training that is over.
    """
    if progress < WARM_UP:
        return progress / WARM_UP
    fall = (progress - WARM_UP) / (1 - WARM_UP)
    return FINAL_RATE + (1 - FINAL_RATE) * (1 + math.cos(math.pi * fall)) / 2


def training_windows(
    stream: TokenStream, settings: TrainSettings, device: torch.device
) -> Iterator[Tensor]:
    """Batches of random windows, int64 [batch, context + 1]; each epoch has another offset."""
    import torch

    tokens_N = torch.from_numpy(stream.train_N.astype("int32")).to(device)
    generator = torch.Generator().manual_seed(settings.seed)
    within_T = torch.arange(settings.context + 1, device=device)
    while True:
        offset = int(torch.randint(settings.context, (), generator=generator))
        starts_W = torch.arange(offset, len(tokens_N) - settings.context, settings.context)
        order_W = torch.randperm(len(starts_W), generator=generator)
        for starts_B in starts_W[order_W].to(device).split(settings.batch):
            yield tokens_N[starts_B[:, None] + within_T].long()


def validation_windows(
    stream: TokenStream, context: int, device: torch.device, most: int = 64
) -> dict[str, Tensor]:
    """The first windows of the held-out text, int64 [windows, context + 1], by domain."""
    import torch

    windows = {}
    for name, ids_N in stream.val.items():
        tokens_N = torch.from_numpy(ids_N.astype("int64")).to(device)
        length = min(context + 1, len(tokens_N))
        windows[name] = tokens_N.unfold(0, length, context)[:most]
    return windows


if __name__ == "__main__":
    run(main, TrainSettings, prog="python -m exports.train_moe")
