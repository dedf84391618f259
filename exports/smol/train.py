"""Training of smol-moe: differences between the experts, and the routers, on a GPU in minutes.

    python -m exports.smol.text --out runs/smol
    python -m exports.smol.train --tokens runs/smol/tokens.safetensors --out runs/smol/out

The dense weights, attention and embeddings stay as they are. What is learned is checked and
measured as it is stored: in int8.
"""

from __future__ import annotations

import copy
import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.numpy import save_file
from torch import Tensor

from exports.smol.chats import chat_prompts, write_chats
from exports.smol.dense import digest_of, find_gguf, read_dense, read_dense_tokenizer
from exports.smol.differences import FILE, differences_of, pack, put_into, unpack
from exports.smol.layer import UpcycledBlock, upcycle
from exports.smol.losses import mean_balance, mean_information, token_losses
from exports.smol.measuring import compared, losses, routing
from exports.smol.routers import start_routers
from exports.smol.settings import SmolSettings
from exports.smol.text import DomainTokens, TokenIds, mixed_batches, windows
from exports.train_moe import rate_at
from routing.cli import run

START_WINDOWS = 96
"""Windows that the routers start from."""
MEASURING = 0.07
"""Share of the time that is left for measuring."""
LOGS = 40
CHATS = "chats"


def main(settings: SmolSettings) -> None:
    """Train, pack and measure."""
    gguf = find_gguf()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    dense = read_dense(gguf, dtype).to(device)
    train(
        settings, DomainTokens.load(settings.tokens), dense, read_dense_tokenizer(gguf),
        digest_of(gguf),
    )  # fmt: skip


def train(
    settings: SmolSettings, text: DomainTokens, dense: Any, tokenizer: Any, dense_sha256: str
) -> dict[str, Any]:
    """Train on `text` from the dense model; write differences and record, which is returned."""
    started = time.monotonic()
    settings.out.mkdir(parents=True, exist_ok=True)
    chats = _chats(settings, dense, tokenizer)
    print(f"{len(chats)} tokens of chats at {time.monotonic() - started:.0f} s", flush=True)
    model = copy.deepcopy(dense)
    blocks = upcycle(model, settings, settings.seed)
    batches = _batches(settings, text, chats, next(dense.parameters()).device)
    _start(settings, model, blocks, text)
    dense_losses = losses(dense, text.held_out, settings.context)
    print(f"routers and dense losses at {time.monotonic() - started:.0f} s", flush=True)
    until = started + settings.seconds * (1 - MEASURING)
    history = _fit(settings, model, dense, blocks, batches, until)
    pack(differences_of(blocks, dense_sha256), settings.out / FILE)
    put_into(unpack(settings.out / FILE), blocks)
    record = {
        "settings": {k: v for k, v in asdict(settings).items() if not isinstance(v, Path)},
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "tokens": {name: len(ids_N) for name, ids_N in text.train.items()} | {CHATS: len(chats)},
        "history": history,
        "held_out": compared(dense_losses, losses(model, text.held_out, settings.context)),
        "routing": routing(model, blocks, text.held_out, settings.context),
        "seconds": round(time.monotonic() - started, 1),
    }
    (settings.out / "training.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    _report(record)
    return record


def _chats(settings: SmolSettings, dense: Any, tokenizer: Any) -> TokenIds:
    if not settings.chat_share:
        return np.empty(0, np.uint16)
    prompts = chat_prompts(tokenizer, settings.chats, settings.seed)
    end = tokenizer.eos_token_id
    new_tokens = settings.chat_tokens
    chats = write_chats(dense, prompts, end=end, new_tokens=new_tokens, seed=settings.seed)
    save_file({CHATS: chats}, settings.out / "chats.safetensors")
    print(tokenizer.decode(chats[:300].tolist()), flush=True)
    return chats


def _batches(
    settings: SmolSettings, text: DomainTokens, chats: TokenIds, device: torch.device
) -> Iterator[tuple[Tensor, Tensor]]:
    """Windows of text and then of chats, int64 [B, context + 1], and their domains [B]."""
    own = round(settings.batch * settings.chat_share) if len(chats) else 0
    mixed = mixed_batches(text.train, settings.batch - own, settings.context, settings.seed)
    talk = mixed_batches({CHATS: chats}, own, settings.context, settings.seed) if own else None
    for windows_BT, domains_B in mixed:
        if talk is not None:
            chats_BT, _ = next(talk)
            windows_BT = np.concatenate([windows_BT, chats_BT])
            domains_B = np.concatenate([domains_B, np.full(own, len(text.train))])
        yield torch.from_numpy(windows_BT).to(device), torch.from_numpy(domains_B).to(device)


def _start(
    settings: SmolSettings, model: Any, blocks: list[UpcycledBlock], text: DomainTokens
) -> None:
    """Set the routers from windows of every domain."""
    device = next(model.parameters()).device
    count = max(1, START_WINDOWS // len(text.train))
    cut = [windows(ids_N, settings.context)[:count, :-1] for ids_N in text.train.values()]
    domains_B = torch.arange(len(cut)).repeat_interleave(torch.tensor([len(own) for own in cut]))
    windows_BT = torch.from_numpy(np.concatenate(cut)).to(device)
    start_routers(model, blocks, windows_BT, domains_B, settings.seed)


def _fit(
    settings: SmolSettings,
    model: Any,
    dense: Any,
    blocks: list[UpcycledBlock],
    batches: Iterator[tuple[Tensor, Tensor]],
    until: float,
) -> list[dict[str, float]]:
    """Run the steps until the clock says `until`. Returns the losses over time."""
    optimizer = _optimizer(settings, blocks)
    rates = [group["lr"] for group in optimizer.param_groups]
    history: list[dict[str, float]] = []
    started, step, shown = time.monotonic(), 0, -1
    while step != settings.steps and (now := time.monotonic()) < until:
        progress = (now - started) / (until - started)
        if settings.steps is not None:
            progress = max(progress, step / settings.steps)
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * rate_at(progress)
        parts = step_losses(settings, model, dense, blocks, *next(batches))
        parts["total"].backward()
        for group in optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        if int(progress * LOGS) != shown:
            shown = int(progress * LOGS)
            history.append(_log(step, parts, now - started))
    return history


def _optimizer(settings: SmolSettings, blocks: list[UpcycledBlock]) -> torch.optim.Optimizer:
    pairs = [matrix for block in blocks for matrix in block.pairs.values()]
    groups: list[dict[str, Any]] = [{"params": pairs, "lr": settings.learning_rate}]
    for block in blocks:
        size = block.router.detach().square().mean().sqrt().item()
        groups.append({"params": [block.router], "lr": settings.router_rate * size})
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), weight_decay=0.0)


def step_losses(
    settings: SmolSettings,
    model: Any,
    dense: Any,
    blocks: list[UpcycledBlock],
    windows_BT: Tensor,
    domains_B: Tensor,
) -> dict[str, Tensor]:
    """Losses of a batch; `total` is what is minimised. Chats are the windows of the last domain."""
    inputs_BT, targets_BT = windows_BT[:, :-1], windows_BT[:, 1:]
    with torch.no_grad():
        teacher_BTH = dense.model(input_ids=inputs_BT, use_cache=False).last_hidden_state
    student_BTH = model.model(input_ids=inputs_BT, use_cache=False).last_hidden_state
    entropy_N, divergence_N = token_losses(
        student_BTH.flatten(0, 1),
        teacher_BTH.flatten(0, 1),
        model.lm_head.weight,
        targets_BT.flatten(),
    )
    own = round(len(windows_BT) * settings.chat_share)
    text = (len(windows_BT) - own) * inputs_BT.shape[1]
    entropy, away = entropy_N[:text].mean(), divergence_N[:text].mean()
    chat = divergence_N[text:].mean() if own else torch.zeros_like(away)
    share = own / len(windows_BT)
    balance, information = mean_balance(blocks), mean_information(blocks, domains_B)
    total = (1 - share) * (entropy + settings.distil * away) + 2 * share * chat
    total = total + settings.balance * balance - settings.specialise * information
    parts = {"total": total, "entropy": entropy, "divergence": away, "chats": chat}
    return parts | {"balance": balance, "information": information}


def _log(step: int, parts: dict[str, Tensor], seconds: float) -> dict[str, float]:
    entry = {name: round(value.item(), 4) for name, value in parts.items()}
    if not math.isfinite(entry["total"]):
        raise ValueError(f"the loss is {entry['total']} at step {step}: lower --learning_rate")
    entry = {"step": step, "seconds": round(seconds, 1), **entry}
    print(json.dumps(entry), flush=True)
    return entry


def _report(record: dict[str, Any]) -> None:
    for name, row in record["held_out"]["perplexity"].items():
        change = row["mixture"] / row["dense"] - 1
        entropy = record["routing"]["entropy_by_domain"][name]
        print(
            f"{name:14} dense {row['dense']:8.2f}  mixture {row['mixture']:8.2f}  {change:+.1%}  "
            f"usage entropy {entropy:.3f}"
        )
    usage = {k: round(record["routing"][k], 3) for k in ("least_used", "most_used", "entropy")}
    print(json.dumps(usage), f"{record['seconds']} s", flush=True)


if __name__ == "__main__":
    run(
        main,
        SmolSettings,
        prog="python -m exports.smol.train",
        examples=["--tokens runs/smol/tokens.safetensors --out runs/smol/out"],
    )
