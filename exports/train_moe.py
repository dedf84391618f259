"""Trains a small mixture-of-experts model from scratch: how `exports/moe-8x32` was made.

Two steps, so that the second can run where only the tokens are at hand:

    python -m exports.train_moe --text TEXT --exclude exports/sample --tokens TOKENS
    python -m exports.train_moe --tokens TOKENS --out MODEL

`--text` and `--out` together do both.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from exports.architecture import Architecture, new_model
from routing.cli import run

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from exports.token_stream import TokenStream

WARM_UP = 0.02
"""Part of the training in which the learning rate rises."""
FINAL_RATE = 0.05
"""Learning rate at the end, over the highest."""
NOT_HIDDEN = ("embed_tokens.weight", "gate.weight")
"""Matrices that do not lie between hidden states: the embeddings' and the routers'."""


@dataclass(frozen=True, kw_only=True)
class Settings(Architecture):
    """Train a small mixture-of-experts language model."""

    text: Path | None = None
    """Folder to tokenise: DOMAIN.txt and val/DOMAIN.txt, documents parted by `<|endoftext|>`."""
    domains: list[str] = field(default_factory=list)
    """Domains to take from the text folder; all of them when empty."""
    exclude: list[Path] = field(default_factory=list)
    """Folders of .txt files whose documents are never trained on."""
    tokens: Path | None = None
    """Folder for the tokenised text: written with --text, read without."""
    out: Path | None = None
    """Folder for the trained model."""
    vocab_size: int = 4096
    """Entries of the tokenizer."""
    tokens_per_domain: int = 5_000_000
    """Tokens taken from each domain at most."""
    context: int = 1024
    """Tokens of a training window, and the model's longest input."""
    batch: int = 64
    """Windows a step."""
    steps: int = 8000
    """Steps to train for."""
    minutes: float = 60.0
    """Time to train for: the learning rate falls to its end by this time even if steps are left."""
    learning_rate: float = 3e-3
    """Highest learning rate."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """`muon`: Muon for the matrices between hidden states, AdamW for the rest. It learns more from
    each token, and takes a sixth longer a step on a CPU."""
    balance: float = 0.01
    """Weight of the load-balancing loss."""
    experts: str = "grouped_mm"
    """Experts implementation of transformers to train with: grouped_mm, batched_mm or eager."""
    seed: int = 0
    """Seed of initialisation and of the order of the text."""

    def __post_init__(self) -> None:
        """Refuse settings that would do nothing."""
        super().__post_init__()
        if self.text is None and self.tokens is None:
            raise ValueError("nothing to train on: give --text, or --tokens of an earlier run")
        if self.tokens is None and self.out is None:
            raise ValueError("nothing to write: give --out, or --tokens to tokenise only")


def main(settings: Settings) -> None:
    """Tokenise, train, measure and save, as far as the settings ask for it."""
    stream = _stream(settings)
    if settings.out is not None:
        train(settings, stream, settings.out)


def _stream(settings: Settings) -> TokenStream:
    from exports.token_stream import TokenStream, tokenise_folder

    if settings.text is None:
        assert settings.tokens is not None
        return TokenStream.load(settings.tokens)
    names = settings.domains or sorted(path.stem for path in settings.text.glob("*.txt"))
    if not names:
        raise ValueError(f"{settings.text} holds no .txt files")
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


def train(settings: Settings, stream: TokenStream, out: Path) -> None:
    """Train on `stream`; save model, tokenizer and `training.json` (settings, figures) in `out`."""
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


def untrained_model(settings: Settings, stream: TokenStream) -> Any:
    """A model of the shape asked for, with random float32 weights, for the tokens of `stream`."""
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
    model: nn.Module, tap: Any, settings: Settings, stream: TokenStream
) -> list[dict[str, Any]]:
    """Run the steps; returns what was measured on the way, about fifty times."""
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


def new_optimizer(model: nn.Module, settings: Settings) -> torch.optim.Optimizer:
    """The optimizer that the settings ask for."""
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
    """Learning rate over its highest at a part of the training: linear rise, then cosine fall."""
    if progress < WARM_UP:
        return progress / WARM_UP
    fall = (progress - WARM_UP) / (1 - WARM_UP)
    return FINAL_RATE + (1 - FINAL_RATE) * (1 + math.cos(math.pi * fall)) / 2


def training_windows(
    stream: TokenStream, settings: Settings, device: torch.device
) -> Iterator[Tensor]:
    """Batches of random windows, int64 [batch, context + 1], each epoch cut at another offset."""
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
    """The first windows of each domain's held-out text, int64 [windows, context + 1]."""
    import torch

    windows = {}
    for name, ids_N in stream.val.items():
        tokens_N = torch.from_numpy(ids_N.astype("int64")).to(device)
        length = min(context + 1, len(tokens_N))
        windows[name] = tokens_N.unfold(0, length, context)[:most]
    return windows


if __name__ == "__main__":
    run(main, Settings, prog="python -m exports.train_moe")
