"""`runtime.load`: offload a model's experts under a cache policy, with or without prediction."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import nn

from routing.predictor_file.reader import PredictorFile, open_predictor
from routing.topology import Topology
from runtime.cache.belady import Belady
from runtime.cache.policies import POLICIES
from runtime.cache.policy import Policy
from runtime.cache.predicted_reuse import PredictedReuse
from runtime.cache.rules.hot_set import HotSet
from runtime.cache.rules.reuse import Reuse
from runtime.cuda.options import CudaOptions
from runtime.engine.cpu_backend import CpuBackend
from runtime.engine.engine import Engine
from runtime.engine.guards.adapters import load_adapter_beside
from runtime.engine.guards.wrappers import base_model
from runtime.engine.step_inputs import end_tokens
from runtime.kv.size import page_bytes
from runtime.prediction.forecaster import Forecaster
from runtime.prediction.route_log import LIMIT, RouteLog
from runtime.simulation.trace_steps import trace_calls
from runtime.sizing.budget import slot_budget
from runtime.sizing.cache_tokens import refuse_spill_tokens
from runtime.sizing.host_memory import require_host_memory
from runtime.sizing.units import parse_memory, parse_size
from runtime.weights.repository.hub import HubOptions, refuse_for_module
from runtime.weights.source import Source, from_module, from_path

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from runtime.offloaded_model import OffloadedModel


HOSTS = ("file", "memory", "shared")


def load(
    model: str | Path | nn.Module,
    predictor: str | Path | None = None,
    *,
    memory: float | int | str = 0.25,
    policy: str | None = None,
    device: str | int | torch.device | None = None,
    dtype: str | torch.dtype = "auto",
    tokenizer: PreTrainedTokenizerBase | None = None,
    replay: str | Path | Iterable[tuple[int, np.ndarray]] | None = None,
    host: str = "file",
    context: int | None = None,
    batch: int | None = None,
    cache_tokens: int | None = None,
    spill_tokens: int | None = None,
    prefetch: bool | str | None = None,
    cpu_share: bool | str | None = None,
    compile: bool | str | None = None,
    record: str | Path | None = None,
    record_limit: int | str = LIMIT,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    attn_implementation: str | None = None,
) -> OffloadedModel:
    """Offload the experts of `model` and return it, with an `Engine` at `model.expertflow`.

    model: a checkpoint directory, a hub id, or a model in memory, also of PEFT (changed in place,
        until `model.expertflow.detach()`). Experts of a quantised directory stay in its own 4 or 8
        bits (mxfp4, fp8, int4, nvfp4); their weights are those that dequantising it gives.
    predictor: an ONNX file of `predictor.export`.
    memory: the fraction of all experts that stays resident, or the bytes ("2GiB") for the model's
        other weights and the expert slots together. On the CPU the key/value cache comes on top; on
        a GPU the bytes are for everything: key/value cache, workspace and graphs too. There
        bfloat16 experts stay packed, so a third more of them fit, and slots hold the checkpoint's
        own codes where kernels run them (`model.expertflow.decode_path` says "graph", or why not);
        elsewhere they hold decoded weights, of two to four times the bytes.
    policy: "lru", "lfu", "class-lru", "lfru", "reuse", "hot-set", "predicted" or "belady"; by
        default "predicted" with a predictor, else "reuse".
    device: where the model computes ("cuda", "cuda:1", 1, "cpu"); by default a GPU for a path, if
        there is one, and a module's own device.
    dtype: of a model loaded from a path; "auto" is the checkpoint's.
    tokenizer: checked against the predictor's; a directory's own is found by itself.
    replay: a trace directory, or calls: for "belady" exactly those to come, for "hot-set" those
        of other text, whose most used experts stay.
    host: where the experts of a path live when they are not in a slot: "file" reads each where it
        lies (the system keeps in memory what it has room for), "memory" reads all of them now. On a
        GPU they always end in pinned memory; "shared" makes that one copy for all processes of this
        machine that load the same prepared model, one for each of its GPUs.
    record: a directory that keeps the token ids and routes of everything that runs, as a trace to
        train the predictor further with. Off by default: the text can be read back from it.
    record_limit: bytes ("256MiB") at which recording into the directory ends.
    revision, token, cache_dir: of a hub id, as transformers takes them. Its small files are fetched
        and judged before its weights.
    attn_implementation: transformers' attention, as "sdpa" or "eager"; by default its own choice.

    These shape captured steps on a GPU; on a CPU they change nothing, and a warning says so:

    context, batch: the longest sequence (prompt and generated tokens; 2048 by default) and the most
        sequences (1 by default) that are decoded as captured CUDA graphs; the key/value cache is
        that large.
    cache_tokens: room of that cache for the tokens of all served sequences together, where most are
        shorter than `context` (batch x context by default). Sequences take pages of 64 as they
        grow; where none is left, the newest waits in host memory. Of models that keep plain keys
        and values.
    prefetch: fetch likely experts while the link is idle, in decode steps those of the coming
        layers and of the next token, in prompts those of the next layer. "auto", the default, tries
        it in decode steps for some three hundred steps in turns with steps without it, keeps the
        faster way and says so (`model.expertflow.prefetching`).
    cpu_share: let the CPU compute some of the experts that a single sequence's step misses, where
        they lie, with the same bits. "auto", the default, prepares it in the background, tries it
        by the clock and says what it found (`model.expertflow.cpu_share`).
    compile: fuse the model's own operations with torch.compile (off by default); the first token of
        each batch size then waits for the compiler, tens of seconds for a large model when it is
        first loaded. "auto" does not wait: plain steps run until a process beside them has compiled
        the model, and later generations use that (in bfloat16 with other roundings).

    Slots, pinned memory and threads are freed by `model.expertflow.close()`, or when the garbage
    collector finds the dropped model.

    Raises ValueError, naming the thing and the remedy, when something does not fit together; the
    model is then as it was.
    """
    whole = model
    if isinstance(model, nn.Module):
        model = base_model(model)
    budget, target = parse_memory(memory), target_device(device, model)
    given = {
        "context": context, "batch": batch, "cache_tokens": cache_tokens,
        "spill_tokens": spill_tokens, "prefetch": prefetch, "cpu_share": cpu_share,
        "compile": compile,
    }  # fmt: skip
    options = _cuda_options(given, target)
    file = None if predictor is None else open_predictor(predictor)

    def accept(topology: Topology) -> None:
        if file is not None:
            theirs = f"the predictor {predictor}"
            topology.require_match(file.topology, ours="the model", theirs=theirs)

    hub = HubOptions(revision=revision, token=token, cache_dir=cache_dir)
    host = _host_on(target, host)
    source = _open(model, tokenizer, dtype, host, hub, attn_implementation, accept)
    chosen = choose_policy(policy, source, file, replay)
    forecaster = Forecaster(file) if file is not None and chosen.needs_forecast else None
    route_log = None if record is None else _route_log(record, record_limit, source)
    if target.type == "cuda":
        offload_on_gpu(source, budget, target, chosen, options, forecaster, route_log)
    else:
        backend = CpuBackend(source, slot_budget(budget, source), target, chosen)
        Engine(source, backend, forecaster, route_log, target)
    if isinstance(whole, nn.Module):
        return cast("OffloadedModel", whole)
    load_adapter_beside(source.model)
    return cast("OffloadedModel", source.model)


def offload_on_gpu(
    source: Source,
    memory: float | int,
    device: torch.device,
    policy: Policy,
    options: CudaOptions,
    forecaster: Forecaster | None = None,
    route_log: RouteLog | None = None,
) -> OffloadedModel:
    """Attach an engine with the CUDA backend to the model of `source`, and return the model."""
    from runtime.cuda.backend import CudaBackend
    from runtime.cuda.device_budget import device_budget

    tokens, spilled = options.paged_tokens, options.spilled_tokens
    budget = device_budget(
        source, memory, context=options.context, batch=options.batch, tokens=tokens
    )
    require_host_memory(spilled, page_bytes(source.model, spilled) if spilled else 0)
    backend = CudaBackend(source, budget, device, policy, options, forecaster, route_log)
    Engine(source, backend, forecaster, route_log, device)
    return cast("OffloadedModel", source.model)


def _cuda_options(given: dict[str, Any], device: torch.device) -> CudaOptions:
    """The options that were given, which say nothing on a CPU: that is reported."""
    chosen = {name: value for name, value in given.items() if value is not None}
    if device.type != "cuda":
        refuse_spill_tokens(given["spill_tokens"])
    options = CudaOptions(**chosen)
    if chosen and device.type != "cuda":
        names = ", ".join(f"{name}=" for name in chosen)
        warnings.warn(
            f"{names} shape captured steps on a GPU; on {device} they change nothing", stacklevel=3
        )
    return options


def _route_log(directory: str | Path, limit: int | str, source: Source) -> RouteLog:
    num_bytes = parse_size(limit, "record_limit")
    return RouteLog(directory, source.topology, limit=num_bytes, eos_ids=end_tokens(source.model))


def _open(
    model: str | Path | nn.Module,
    tokenizer: Any,
    dtype: str | torch.dtype,
    host: str,
    hub: HubOptions,
    attention: str | None,
    accept: Callable[[Topology], None],
) -> Source:
    if host not in HOSTS:
        raise ValueError(f"host={host!r} is not one of {', '.join(HOSTS)}")
    if isinstance(model, nn.Module):
        refuse_for_module(hub, attention)
        if host == "shared":
            raise ValueError("host='shared': give the directory of a prepared model, not a module")
        source = from_module(model, tokenizer)
        accept(source.topology)
        return source
    if attention is not None and ("/" in attention or "|" in attention):
        raise ValueError(
            f"attn_implementation={attention!r} names code on the hub, which is never run; name "
            "one of transformers' own, as 'sdpa' or 'eager'"
        )
    options: dict[str, Any] = {"hub": hub, "attention": attention, "accept": accept}
    return from_path(
        model, tokenizer, dtype, in_memory=host == "memory", shared=host == "shared", **options
    )


def _host_on(target: torch.device, host: str) -> str:
    """Where experts live, of what was asked for. Raises ValueError for what is none on a CPU."""
    if host == "shared" and target.type == "cpu":
        raise ValueError(
            "host='shared' is for a GPU's pinned memory; on a CPU leave it out: processes that "
            "read one file share its pages"
        )
    return "file" if host == "memory" and target.type != "cpu" else host


def choose_policy(
    name: str | None, source: Source, file: PredictorFile | None, replay: Any
) -> Policy:
    """The policy of that name; by default predicted reuse with a predictor, else reuse.

    Raises ValueError for an unknown name, and where a policy lacks what it needs.
    """
    name = name or (Reuse.name if file is None else PredictedReuse.name)
    if name not in POLICIES:
        raise ValueError(f"policy={name!r} is not one of {', '.join(POLICIES)}")
    sizes = len(source.layers), max(layer.num_experts for layer in source.layers)
    if name == PredictedReuse.name:
        if file is None:
            raise ValueError("policy='predicted' needs a predictor: load(model, 'predictor.onnx')")
        return PredictedReuse(*sizes, horizon=file.horizon)
    if name == HotSet.name:
        if replay is None:
            raise ValueError("policy='hot-set' needs replay=, a trace whose experts to count")
        return HotSet(*sizes, calls=_replayed(replay, source, decode_all=True))
    if name == Belady.name:
        if replay is None:
            raise ValueError("policy='belady' needs replay=, a trace of the calls to come")
        return Belady(*sizes, calls=_replayed(replay, source))
    return POLICIES[name](*sizes)


def _replayed(
    replay: Any, source: Source, *, decode_all: bool = False
) -> Iterable[tuple[int, np.ndarray]]:
    if not isinstance(replay, (str, Path)):
        return replay
    return trace_calls(replay, source.topology, decode_all=decode_all)


def target_device(
    device: str | int | torch.device | None, model: str | Path | nn.Module
) -> torch.device:
    """Where to compute: a GPU for a path, if there is one, and a module's own device, unless said.

    device: also a number, of a GPU. Raises ValueError for anything that is no device here.
    """
    if device is None and isinstance(model, nn.Module):
        return next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    has_cuda = torch.cuda.is_available()
    place = f"cuda:{device}" if type(device) is int else device
    try:
        target = torch.device(("cuda" if has_cuda else "cpu") if place is None else place)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device!r} is not a device: {error!s:.60} ...") from error
    if target.type == "cuda" and not has_cuda:
        raise ValueError(f"device={device!r}: torch sees no CUDA device here")
    return target
