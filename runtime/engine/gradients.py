"""Gradients through experts calls: for hidden states, routing weights and all that is no expert.

The slots that a call ran out of are soon filled with other experts, so a backward pass cannot use
them. It runs each expert of the call anew, read from the host tier into memory of its own, one
after the other: no lock, no slot, and no more memory than one expert takes. The weights of experts
are constants.

    what is differentiated                       what runs the experts
    nothing                                      the backend, out of slots
    a loss, by `backward` or `autograd.grad`     the backend; in the backward pass the host tier
    a gradient; forward mode                     the host tier, with torch's own operations
    a layer that is checkpointed, once more      the host tier
    a layer with dropout, in training            the host tier, as the stock model: in order
"""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.dropout import _DropoutNd
from torch.optim.optimizer import register_optimizer_step_pre_hook

from routing.layers import MoELayer, Routes
from runtime.engine.experts import RUN, run_experts, sort_pairs, spans_of, twin

ReadExpert = Callable[[int], dict[str, Tensor]]
"""Given an expert, a copy of its parameters that nobody changes."""

NOT_TRAINED = (
    "the experts of an offloaded model are constants: the gradients of all other weights are "
    "right, but experts get none and are not trained. To train them, use "
    "model.expertflow.detach(); to silence this, freeze what is not to be trained: "
    "parameter.requires_grad_(False)"
)


class LayerCall(NamedTuple):
    """An experts call of one layer."""

    layer: MoELayer
    run: Callable[[Tensor, Routes], Tensor]
    """Out of slots."""
    read: ReadExpert
    """From the host tier."""
    on_backward: Callable[[], None]
    """Told of every backward pass."""

    def __call__(self, hidden: Tensor, routes: Routes) -> Tensor:
        """The layer's output for hidden states [..., H], which gradients can pass."""
        weights_TK = routes.weights_TK
        if _is_dual(hidden) or _is_dual(weights_TK):
            return self.from_host(hidden, routes)
        call = self
        if in_backward() or drops_out(self.layer.module):
            call = self._replace(run=self.from_host)
        own = self.own if torch.is_grad_enabled() else {}
        needed = hidden, weights_TK, *own.values()
        if not torch.is_grad_enabled() or not any(tensor.requires_grad for tensor in needed):
            return call.run(hidden, routes)
        output: Tensor = _ExpertsCall.apply(
            call, tuple(own), hidden, routes.experts_TK, weights_TK, *own.values()
        )
        return output

    @property
    def own(self) -> dict[str, Tensor]:
        """The layer's trained parameters that belong to no expert, by their paths."""
        named = self.layer.module.named_parameters()
        return {path: parameter for path, parameter in named if parameter.requires_grad}

    def from_host(self, hidden: Tensor, routes: Routes) -> Tensor:
        """The same by torch's own operations, with copies that a graph may keep."""
        return run_experts(self.layer, hidden, routes, self._copies)

    def _copies(self, experts: list[int]) -> Iterator[tuple[int, dict[str, Tensor]]]:
        for expert in experts:
            yield expert, self.read(expert)


def in_backward() -> bool:
    """Whether autograd runs a backward pass in this thread: a checkpointed layer runs again."""
    return torch._C._current_graph_task_id() != -1


def drops_out(module: nn.Module) -> bool:
    """Whether random numbers are drawn in the experts: then their order counts."""
    return module.training and any(
        isinstance(part, _DropoutNd) and part.p > 0 for part in module.modules()
    )


def refuse_transforms() -> None:
    """Raise ValueError within a transform of `torch.func`: slots are none of its values."""
    if torch._C._functorch.peek_interpreter_stack() is not None:
        raise ValueError(
            "torch.func (grad, jvp, vmap) cannot go through an offloaded model; use autograd "
            "(backward, torch.autograd.grad, torch.autograd.forward_ad) and batches"
        )


def _is_dual(tensor: Tensor) -> bool:
    """Whether forward-mode derivatives go through `tensor`."""
    if forward_ad._current_level < 0:
        return False
    return forward_ad.unpack_dual(tensor).tangent is not None


class _ExpertsCall(torch.autograd.Function):
    """Takes the call, the paths of its own parameters, hidden states, experts, weights and these
    parameters.
    """

    @staticmethod
    def forward(
        ctx: Any, call: LayerCall, paths: tuple[str, ...], hidden: Tensor, *rest: Tensor
    ) -> Tensor:
        experts_TK, weights_TK, *_ = rest
        ctx.call, ctx.paths, ctx.surroundings = call, paths, Surroundings.of(call, hidden)
        ctx.save_for_backward(hidden, *rest)
        return call.run(hidden, Routes(experts_TK, weights_TK))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        hidden, experts_TK, weights_TK, *own = ctx.saved_tensors
        inputs = hidden, weights_TK, *own
        needs = [index for index in range(len(inputs)) if inputs[index].requires_grad]
        routes = Routes(experts_TK, weights_TK)
        again = _differentiable if torch.is_grad_enabled() else _expert_by_expert
        ctx.call.on_backward()
        with ctx.surroundings.restored():
            found = again(ctx.call, ctx.paths, hidden, routes, own, grads[0], needs)
        of_hidden, of_weights, *of_own = found
        return None, None, of_hidden, None, of_weights, *of_own


def _differentiable(
    call: LayerCall, paths: tuple[str, ...], hidden: Tensor, routes: Routes, own: list[Tensor],
    grad: Tensor, needs: list[int],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients that can be differentiated again: the graph keeps a copy of each expert."""
    inputs = [tensor.view_as(tensor) for tensor in (hidden, routes.weights_TK, *own)]
    hidden, weights_TK, *own = inputs  # views: weights that come of hidden states end here
    call = call._replace(layer=_with(call.layer, paths, own))
    output = call.from_host(hidden, Routes(routes.experts_TK, weights_TK))
    wanted = [inputs[index] for index in needs]
    found = torch.autograd.grad(output, wanted, grad, create_graph=True, allow_unused=True)
    grads: list[Tensor | None] = [None] * len(inputs)
    for index, one in zip(needs, found, strict=True):
        grads[index] = one
    return grads


@torch.enable_grad()
def _expert_by_expert(
    call: LayerCall, paths: tuple[str, ...], hidden: Tensor, routes: Routes, own: list[Tensor],
    grad: Tensor, needs: list[int],
) -> list[Tensor | None]:  # fmt: skip
    """Gradients of the sum over experts, of which one is in memory at a time."""
    own = [parameter.detach().requires_grad_() for parameter in own]
    layer = _with(call.layer, paths, own)
    top_k = routes.experts_TK.shape[1]
    order_P, counts = sort_pairs(routes.experts_TK, layer.num_experts)
    tokens_P = order_P // top_k
    x_TH, grad_TH = hidden.detach().flatten(0, -2), grad.detach().flatten(0, -2)
    weights_P = routes.weights_TK.detach().reshape(-1)[order_P]
    of_x_PH, of_weights_P = torch.zeros_like(x_TH[tokens_P]), torch.zeros_like(weights_P)
    of_own: list[Tensor | None] = [None] * len(own)

    def add(span: slice, run: Callable[[Tensor], Tensor]) -> None:
        x_NH = x_TH[tokens_P[span]].requires_grad_()
        weights_N = weights_P[span].requires_grad_()
        y_NH = run(x_NH).to(x_NH.dtype) * weights_N[:, None]
        of_y_NH = grad_TH[tokens_P[span]].to(y_NH.dtype)
        inputs = x_NH, weights_N, *own
        found = torch.autograd.grad(y_NH, inputs, of_y_NH, allow_unused=True)
        of_x_PH[span], of_weights_P[span] = found[:2]
        for index, one in enumerate(found[2:]):
            before = of_own[index]
            of_own[index] = one if before is None or one is None else before + one

    for expert, span in spans_of(counts.tolist()).items():
        parameters = call.read(expert)
        add(span, lambda x_NH: RUN[layer.kind](layer.module, x_NH, parameters))  # noqa: B023
    if layer.kind == "longcat":  # pairs of no expert pass their hidden states through
        first, last = int(counts[0]), len(order_P) - int(counts[-1])
        for span in (slice(0, first), slice(last, len(order_P))):
            add(span, Tensor.clone)
    of_x_TKH = torch.empty_like(of_x_PH).index_copy_(0, order_P, of_x_PH)
    of_x_TH = of_x_TKH.view(len(x_TH), top_k, -1).sum(1)
    of_weights_TK = torch.empty_like(of_weights_P).index_copy_(0, order_P, of_weights_P)
    return [of_x_TH.view_as(hidden), of_weights_TK.view_as(routes.weights_TK), *of_own]


def _with(layer: MoELayer, paths: tuple[str, ...], own: list[Tensor]) -> MoELayer:
    """The layer with these parameters in place of its own."""
    return layer._replace(module=twin(layer.module, dict(zip(paths, own, strict=True))))


class Surroundings(NamedTuple):
    """State of torch that a layer ran in, and that it must run in again."""

    device: torch.device
    autocast: tuple[bool, torch.dtype]
    random: tuple[Tensor, Tensor | None] | None
    """States of the random numbers, of the host and of the device; None where none are drawn."""

    @classmethod
    def of(cls, call: LayerCall, hidden: Tensor) -> Surroundings:
        """As they are now."""
        kind, random = hidden.device.type, None
        if drops_out(call.layer.module):
            of_device = torch.cuda.get_rng_state(hidden.device) if kind == "cuda" else None
            random = torch.get_rng_state(), of_device
        autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        return cls(hidden.device, autocast, random)

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Within the block, all is as it was."""
        kind, (enabled, dtype) = self.device.type, self.autocast
        devices = [self.device] if kind == "cuda" else []
        with (
            torch.autocast(kind, dtype=dtype, enabled=enabled, cache_enabled=False),
            torch.random.fork_rng(devices, enabled=self.random is not None),
        ):
            if self.random is not None:
                of_host, of_device = self.random
                torch.set_rng_state(of_host)
                if of_device is not None:
                    torch.cuda.set_rng_state(of_device, self.device)
            yield


class ConstantExperts:
    """Nobody may believe that the experts are trained.

    experts: all their parameters, of a model that was given in memory. An optimizer that holds one
    of them to train it raises ValueError at its next step, until `close`. `warn` says once that
    experts are constants, where nothing of the model was frozen.
    """

    def __init__(self, model: nn.Module, experts: Iterable[nn.Parameter]) -> None:
        self._has_warned = False
        self._model = weakref.ref(model)
        held = {id(parameter): weakref.ref(parameter) for parameter in experts}
        handle = register_optimizer_step_pre_hook(partial(_refuse_to_train, held))
        self.close = weakref.finalize(self, handle.remove)

    def warn(self) -> None:
        """A backward pass has reached the experts."""
        model = self._model()
        if self._has_warned or model is None:
            return
        self._has_warned = True
        parameters = (one for one in model.parameters() if type(one) is nn.Parameter)
        if all(parameter.requires_grad for parameter in parameters):
            warnings.warn(NOT_TRAINED, stacklevel=2)


def _refuse_to_train(
    held: dict[int, weakref.ref[nn.Parameter]], optimizer: torch.optim.Optimizer, *_: Any
) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            known = held.get(id(parameter))
            if known is not None and parameter.requires_grad and known() is parameter:
                raise ValueError(
                    f"{type(optimizer).__name__} holds the weights of experts that are offloaded, "
                    "which get no gradient and would not be trained; make the optimizer after "
                    "runtime.load, freeze them before (parameter.requires_grad_(False)), or train "
                    "model.expertflow.detach()"
                )
