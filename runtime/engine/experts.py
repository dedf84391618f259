"""Running a layer's experts out of slots instead of out of the model.

Every (token, expert) pair is one row. Rows are sorted by expert, each expert's rows run in one go,
and a token's K results are summed in the order of its top-k. So the sum never depends on which
experts were resident, on their slots, or on how many waves it took: outputs are bit-identical
between cache sizes and policies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from routing.layers import MoELayer, Routes, bound_call

Slots = Callable[[list[int]], Iterator[tuple[int, dict[str, Tensor]]]]
"""Given distinct expert ids, yields each with its parameters, resident for the moment."""


def run_experts(layer: MoELayer, hidden: Tensor, routes: Routes, slots: Slots) -> Tensor:
    """The experts call of `layer` on hidden states [..., H], with parameters from `slots`."""
    num_rows, top_k = routes.experts_TK.shape
    order_P, counts = sort_pairs(routes.experts_TK, layer.num_experts)
    spans = spans_of(counts.tolist())
    rows_PH = hidden.flatten(0, -2)[order_P // top_k]
    outputs_PH = rows_PH.clone() if layer.kind == "longcat" else torch.zeros_like(rows_PH)
    run = RUN[layer.kind]
    for expert, parameters in slots(list(spans)):
        span = spans[expert]
        outputs_PH[span] = run(layer.module, rows_PH[span], parameters)
    outputs_TKH = torch.empty_like(outputs_PH).index_copy_(0, order_P, outputs_PH)
    outputs_TKH = outputs_TKH.view(num_rows, top_k, -1)
    summed_TH = (outputs_TKH * routes.weights_TK[..., None]).sum(1).to(hidden.dtype)
    return summed_TH.view_as(hidden)


def call_kernels(
    layer: MoELayer,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    run: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """The experts call of `layer` by kernels, without a host sync.

    run: from hidden states [T, H], ids and weights [T, K] to the sums over experts [T, H].
    """
    call = bound_call(layer, args, kwargs)
    hidden, routes = layer.container.tokens(layer, call)
    sums = with_rest(layer, hidden, routes, run(hidden, *routes))
    return with_bias(layer, layer.container.output(layer, call, sums))


def with_rest(layer: MoELayer, hidden: Tensor, routes: Routes, sums: Tensor) -> Tensor:
    """The sums over experts with what tokens get of ids that are no expert's."""
    rest = layer.container.without_experts(layer, hidden, routes)
    return sums if rest is None else sums + rest


def with_bias(layer: MoELayer, output: Tensor) -> Tensor:
    """The result of the experts call: JetMoE adds a bias to the sum over its experts."""
    return output + layer.module.get_parameter("bias") if layer.kind == "jetmoe" else output


def sort_pairs(experts_TK: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Order of the pairs (token * K + k) by expert, and how many each has, [E + 2]: before and
    after those of experts 0 .. E-1 the pairs of none. Nothing waits.
    """
    experts_P = experts_TK.reshape(-1).long().clamp(-1, num_experts) + 1
    counts = experts_P.new_zeros(num_experts + 2)
    counts.scatter_add_(0, experts_P, torch.ones_like(experts_P))
    return experts_P.argsort(stable=True), counts


def spans_of(counts: list[int]) -> dict[int, slice]:
    """Where the pairs of each expert that has any are in that order."""
    spans, start = {}, counts[0]
    for expert, count in enumerate(counts[1:-1]):
        if count:
            spans[expert] = slice(start, start + count)
        start += count
    return spans


def run_fused(module: nn.Module, rows_NH: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    """One expert of a fused container, unweighted: the steps of transformers' experts protocol.

    A class outside that protocol runs its own forward over this one expert.
    """
    if not hasattr(module, "is_transposed"):
        return _own_forward(module, rows_NH, parameters)
    up = "gate_up_proj" if module.has_gate else "up_proj"
    rows = _linear(module, rows_NH, parameters, up)
    rows = module._apply_gate(rows) if module.has_gate else module.act_fn(rows)  # type: ignore[operator]
    rows = _linear(module, rows, parameters, "down_proj")
    if getattr(module, "has_post_expert_norm", False):
        rows = module.post_expert_norm(rows)  # type: ignore[operator]
    return rows


def _linear(module: nn.Module, rows: Tensor, parameters: dict[str, Tensor], name: str) -> Tensor:
    weight = parameters[name]
    rows = rows @ weight if module.is_transposed else F.linear(rows, weight)
    return rows + parameters[f"{name}_bias"] if module.has_bias else rows


def _own_forward(module: nn.Module, rows_NH: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    index_N1 = torch.zeros(len(rows_NH), 1, dtype=torch.int64, device=rows_NH.device)
    alone = twin(module, {name: tensor[None] for name, tensor in parameters.items()})
    alone.num_experts = 1  # type: ignore[assignment]
    ones_N1 = torch.ones_like(index_N1, dtype=rows_NH.dtype)
    return type(module).forward(alone, rows_NH, index_N1, ones_N1)


def twin(module: nn.Module, tensors: Mapping[str, Tensor]) -> nn.Module:
    """A copy of `module` that shares everything with it but some parameters, given by their paths.

    Nothing happens to the module itself, which another thread may be running.
    """
    copy: nn.Module = object.__new__(type(module))
    copy.__dict__.update(module.__dict__)
    for kind in ("_parameters", "_modules"):
        copy.__dict__[kind] = dict(module.__dict__[kind])
    inner: dict[str, dict[str, Tensor]] = {}
    for path, tensor in tensors.items():
        name, _, rest = path.partition(".")
        if rest:
            inner.setdefault(name, {})[rest] = tensor
        else:
            del copy._parameters[name]
            copy.__dict__[name] = tensor
    for name, below in inner.items():
        child = module._modules[name]
        assert child is not None
        copy._modules[name] = twin(child, below)
    return copy


def _longcat(module: Any, rows_NH: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    gate, up = F.linear(rows_NH, parameters["gate_up_proj"]).chunk(2, dim=-1)
    return F.linear(module.act_fn(gate) * up, parameters["down_proj"])


def _dbrx(module: Any, rows_NH: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    output: Tensor = module.mlp(
        rows_NH, *(parameters[f"mlp.{name}"] for name in ("w1", "v1", "w2"))
    )
    return output


def _aria(module: Any, rows_NH: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    gate, up = (rows_NH @ parameters["fc1.weight"]).chunk(2, dim=-1)
    return (F.silu(gate) * up) @ parameters["fc2.weight"]


def _jetmoe(module: Any, rows_NH: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    gate, up = F.linear(rows_NH, parameters["input_linear.weight"]).chunk(2, dim=-1)
    return F.linear(module.activation(gate) * up, parameters["output_linear.weight"])


def _llama4(module: Any, rows_NH: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    gate, up = (rows_NH @ parameters["gate_up_proj"]).chunk(2, dim=-1)
    return (up * module.act_fn(gate)) @ parameters["down_proj"]


def _module(module: nn.Module, rows_NH: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    """One expert that is a module: the first expert's module with other parameters."""
    template: nn.Module = module["expert_0"]  # type: ignore[index]
    output: Tensor = twin(template, parameters)(rows_NH)
    return output


def _nllb(module: Any, rows_NH: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    """In training a whole expert's output is dropped out, instead of scaled by its mean."""
    output = _module(module, rows_NH, parameters)
    dropped: Tensor = module.token_dropout(output) if module.training else output
    return dropped


RUN = {
    "fused": run_fused,
    "longcat": _longcat,
    "dbrx": _dbrx,
    "aria": _aria,
    "jetmoe": _jetmoe,
    "llama4": _llama4,
    "switch": _module,
    "nllb": _nllb,
}
"""One expert of each kind, unweighted, on the rows routed to it."""
