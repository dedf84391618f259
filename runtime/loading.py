"""`runtime.load`: offload a model's experts under a cache policy, with or without prediction."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from runtime.cache.policies import POLICIES, Belady, Policy, PredictedReuse
from runtime.cache.stats import Stats
from runtime.engine.engine import Engine
from runtime.engine.pool import build_pools
from runtime.engine.step_inputs import end_tokens
from runtime.prediction.forecaster import Forecaster
from runtime.prediction.predictor_file import PredictorFile, open_predictor
from runtime.prediction.route_log import LIMIT, RouteLog
from runtime.simulation.trace_steps import trace_calls
from runtime.sizing.budget import parse_memory, parse_size, slots_per_group
from runtime.weights.source import Source, from_module, from_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


HOSTS = ("file", "memory")


def load(
    model: str | Path | nn.Module,
    predictor: str | Path | None = None,
    *,
    memory: float | int | str = 0.25,
    policy: str | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    tokenizer: PreTrainedTokenizerBase | None = None,
    replay: str | Path | Iterable[tuple[int, np.ndarray]] | None = None,
    host: str = "file",
    context: int = 2048,
    batch: int = 1,
    prefetch: bool | str = "auto",
    compile: bool = False,
    record: str | Path | None = None,
    record_limit: int | str = LIMIT,
) -> Any:
    """Offload the experts of `model` and return it, with an `Engine` at `model.expertflow`.

    model: a checkpoint directory, a hub id, or a model in memory (changed in place, until
        `model.expertflow.detach()`).
    predictor: an ONNX file of `predictor.export`.
    memory: the fraction of all experts' bytes that stays resident, or the bytes ("2GiB") for the
        model's other weights and the expert slots together. On the CPU the key/value cache comes on
        top; on a GPU the bytes are for everything: key/value cache, workspace and graphs too. There
        bfloat16 experts stay packed, so a third more of them fit.
    policy: "lru", "lfu", "predicted" or "belady"; by default "predicted" with a predictor, else
        "lru".
    device: where the model computes; by default a GPU for a path, if there is one, and a module's
        own device.
    dtype: of a model loaded from a path; "auto" is the checkpoint's.
    tokenizer: checked against the predictor's; a directory's own is found by itself.
    replay: for "belady", a trace directory of exactly the calls to come, or the calls themselves.
    host: where the experts of a path live when they are not in a slot: "file" reads each where it
        lies (the system keeps in memory what it has room for), "memory" reads all of them now. On a
        GPU they always end in pinned memory.
    context, batch: on a GPU, the longest sequence (prompt and generated tokens) and the most
        sequences that are decoded as captured CUDA graphs; the key/value cache is that large.
    prefetch: on a GPU, fetch one likely expert of the next layer while the link is idle. "auto"
        tries it for some three hundred steps in turns with steps without it, keeps the faster way
        and says so (`model.expertflow.prefetching`).
    compile: on a GPU, fuse the model's own operations with torch.compile; the first token of each
        batch size then waits for the compiler, tens of seconds for a large model.
    record: a directory that keeps the token ids and routes of everything that runs, as a trace to
        train the predictor further with. Off by default: the text can be read back from it.
    record_limit: bytes ("256MiB") at which recording into the directory ends.

    Raises ValueError, naming the thing and the mend, when something does not fit together; the
    model is then as it was.
    """
    if prefetch not in (True, False, "auto"):
        raise ValueError(f"prefetch={prefetch!r} is not one of True, False, 'auto'")
    budget, target = parse_memory(memory), _device(device, model)
    file = None if predictor is None else open_predictor(predictor)
    source = _open(model, tokenizer, dtype, host if target.type == "cpu" else "file")
    if file is not None:
        source.topology.require_match(
            file.topology, ours="the model", theirs=f"the predictor {predictor}"
        )
    chosen = _policy(policy, source, file, replay)
    forecaster = Forecaster(file) if file is not None and chosen.needs_forecast else None
    route_log = None if record is None else _route_log(record, record_limit, source)
    if target.type == "cuda":
        options = {"context": context, "batch": batch, "prefetch": prefetch, "compile": compile}
        _load_on_gpu(source, budget, target, chosen, forecaster, options, route_log)
        return source.model
    slots = slots_per_group(budget, source)
    stats = Stats(layers=source.layers, num_slots=sum(slots), policy=chosen.name)
    pools = build_pools(source, slots, target, chosen, stats)
    Engine(source, chosen, pools, stats, forecaster, target, route_log=route_log)
    return source.model


def _load_on_gpu(
    source: Source,
    budget: float | int,
    target: torch.device,
    policy: Policy,
    forecaster: Forecaster | None,
    options: dict[str, Any],
    route_log: RouteLog | None = None,
) -> None:
    from runtime.cuda.backend import CudaBackend
    from runtime.cuda.device_budget import fit

    if isinstance(budget, int):
        sizes = {name: options[name] for name in ("context", "batch")}
        budget, options["missing"] = fit(source, budget, **sizes)
    slots = slots_per_group(budget, source, off_device=options.get("missing", 0))
    stats = Stats(layers=source.layers, num_slots=sum(slots), policy=policy.name)
    gpu = CudaBackend(source, slots, target, policy, stats, **options)
    if forecaster is not None:
        gpu.predict_with(forecaster, policy, stats)
    if route_log is not None:
        gpu.record_with(route_log)
    Engine(source, policy, gpu.pools, stats, forecaster, target, gpu, route_log)


def _route_log(directory: str | Path, limit: int | str, source: Source) -> RouteLog:
    num_bytes = parse_size(limit, "record_limit")
    return RouteLog(directory, source.topology, limit=num_bytes, eos_ids=end_tokens(source.model))


def _open(
    model: str | Path | nn.Module, tokenizer: Any, dtype: str | torch.dtype, host: str
) -> Source:
    if host not in HOSTS:
        raise ValueError(f"host={host!r} is not one of {', '.join(HOSTS)}")
    if isinstance(model, nn.Module):
        return from_module(model, tokenizer)
    return from_path(model, tokenizer, dtype, in_memory=host == "memory")


def _policy(name: str | None, source: Source, file: PredictorFile | None, replay: Any) -> Policy:
    name = name or ("lru" if file is None else PredictedReuse.name)
    if name not in POLICIES:
        raise ValueError(f"policy={name!r} is not one of {', '.join(POLICIES)}")
    sizes = len(source.layers), max(layer.num_experts for layer in source.layers)
    if name == PredictedReuse.name:
        if file is None:
            raise ValueError("policy='predicted' needs a predictor: load(model, 'predictor.onnx')")
        return PredictedReuse(*sizes, horizon=file.horizon)
    if name == Belady.name:
        if replay is None:
            raise ValueError("policy='belady' needs replay=, a trace of the calls to come")
        return Belady(*sizes, calls=_replayed(replay, source))
    return POLICIES[name](*sizes)


def _replayed(replay: Any, source: Source) -> Iterable[tuple[int, np.ndarray]]:
    if not isinstance(replay, (str, Path)):
        return replay
    return trace_calls(replay, source.topology)


def _device(device: str | torch.device | None, model: str | Path | nn.Module) -> torch.device:
    if device is None and isinstance(model, nn.Module):
        return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    has_cuda = torch.cuda.is_available()
    try:
        target = torch.device(device or ("cuda" if has_cuda else "cpu"))
    except RuntimeError as error:
        raise ValueError(f"device={device!r} is not a device: {error!s:.60} ...") from error
    if target.type == "cuda" and not has_cuda:
        raise ValueError(f"device={device!r}: torch sees no CUDA device here")
    return target
