"""Layouts of experts containers: where each expert's parameters lie, and what a call means.

    kind     parameters of the experts                      called with
    fused    a leading E dimension                          hidden_TH, ids_TK, weights_TK
    longcat  the same; ids from E on pass hidden through    hidden_TH, ids_TK, weights_TK
    dbrx     matrices of E blocks, stacked in rows          hidden_BTH, ids_TK, weights_TK
    aria     a leading E dimension, in two modules          hidden_TH, router_logits_TE
    jetmoe   the same; the block routes by itself           hidden_BTH
    llama4   a leading E dimension; called densely          each expert's scaled hidden, [E x T, H]
    switch   modules `expert_0` ... `expert_{E-1}`          hidden_TH, onehot_T1E, weights_T1
    nllb     modules `expert_0` ... `expert_{E-1}`          hidden_TH, top1_TE, gates_TE

Aria has the layout "aria" under transformers 5.17 and is fused in later ones.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from routing.topology import NO_EXPERT


class Routes(NamedTuple):
    """The experts and weights of every row, K each."""

    experts_TK: Tensor
    """int64; NO_EXPERT where capacity dropped a token, or it uses a parameter-free expert."""
    weights_TK: Tensor


class MoELayer(NamedTuple):
    """One MoE layer of a live model."""

    name: str
    """Module path of the experts container."""
    module: nn.Module
    """The experts container."""
    kind: str
    """A key of `CONTAINERS`."""
    stack: str
    """"encoder" or "decoder"."""
    num_experts: int
    top_k: int

    @property
    def container(self) -> Container:
        """The layout of the layer's parameters and calls."""
        return CONTAINERS[self.kind]


def best_experts(logits_TE: Tensor, top_k: int) -> Routes:
    """The experts of the highest logits, weighted by a softmax over these in float32."""
    logits_TK, experts_TK = logits_TE.float().topk(top_k, dim=-1)
    return Routes(experts_TK, logits_TK.softmax(-1).to(logits_TE.dtype))


class Container:
    """The fused layout, the base of the others."""

    holders: tuple[str, ...] = ("",)
    """Submodules that hold the experts' parameters and nothing else."""

    def num_experts(self, module: Any) -> int:
        """E: the number of experts that have parameters."""
        return len(module.down_proj)

    def names(self, module: nn.Module) -> list[str]:
        """The parameter names of one expert: paths without the expert's number."""
        return [
            f"{holder}.{name}" if holder else name
            for holder in self.holders
            for name, _ in module.get_submodule(holder).named_parameters(recurse=False)
        ]

    def path(self, name: str, expert: int) -> str:
        """The path of an expert's parameter `name`; in this layout all experts share it."""
        return name

    def part(self, tensor: Tensor, expert: int, num_experts: int) -> Tensor:
        """One expert's part of the parameter at `path`, as a view."""
        return tensor[expert]

    def activation(self, module: Any) -> Any:
        """What is applied to an expert's gate."""
        return module.act_fn

    def rows(self, layer: MoELayer, arguments: tuple[Any, ...]) -> Routes:
        """The experts that a call runs on each row of its hidden states.

        Numbers that are no expert's stand for none.
        """
        _, index, weights = arguments
        return Routes(index, weights)

    def routes(self, layer: MoELayer, arguments: tuple[Any, ...]) -> Routes:
        """The router's decision for each token."""
        index, weights = self.rows(layer, arguments)
        return Routes(torch.where(index < layer.num_experts, index, NO_EXPERT), weights)

    def tokens(self, layer: MoELayer, arguments: tuple[Any, ...]) -> tuple[Tensor, Routes]:
        """The call as kernels take it, without a host sync: hidden states [T, H] and their routes,
        where ids that are no expert's stand for none.
        """
        return arguments[0].flatten(0, -2), self.rows(layer, arguments)

    def output(self, layer: MoELayer, arguments: tuple[Any, ...], sums_TH: Tensor) -> Tensor:
        """What the call returns, from the weighted sums over experts."""
        return sums_TH.view_as(arguments[0])

    def without_experts(self, layer: MoELayer, hidden: Tensor, routes: Routes) -> Tensor | None:
        """What is added to the sums over experts for ids that are no expert's; None: nothing."""
        return None


class Dbrx(Container):
    """DBRX: w1, v1 and w2 [E x F, H]."""

    holders = ("mlp",)

    def num_experts(self, module: Any) -> int:
        return int(module.num_experts)

    def part(self, tensor: Tensor, expert: int, num_experts: int) -> Tensor:
        return tensor.unflatten(0, (num_experts, -1))[expert]

    def activation(self, module: Any) -> Any:
        return module.mlp.activation_fn


class Longcat(Container):
    """LongCat-Flash: the rows of `gate_up_proj` for parameter-free experts are never used."""

    def without_experts(self, layer: MoELayer, hidden: Tensor, routes: Routes) -> Tensor | None:
        experts_TK, weights_TK = routes
        passed_T1 = (weights_TK * (experts_TK >= layer.num_experts)).sum(-1, keepdim=True)
        return (hidden * passed_T1).to(hidden.dtype)


class Aria(Container):
    """Aria under transformers 5.17, called with the router's logits."""

    holders = ("fc1", "fc2")

    def num_experts(self, module: Any) -> int:
        return int(module.config.moe_num_experts)

    def activation(self, module: Any) -> Any:
        return nn.functional.silu

    def rows(self, layer: MoELayer, arguments: tuple[Any, ...]) -> Routes:
        experts: Any = layer.module
        return Routes(*experts.route_tokens_to_experts(arguments[1]))


class JetMoe(Container):
    """JetMoE's feed-forward block, which routes by itself."""

    holders = ("input_linear", "output_linear")

    def num_experts(self, module: Any) -> int:
        return int(module.input_linear.num_experts)

    def activation(self, module: Any) -> Any:
        return module.activation

    def rows(self, layer: MoELayer, arguments: tuple[Any, ...]) -> Routes:
        """As its router chooses, which waits for the number of each expert's tokens."""
        router: Any = layer.module.router
        hidden_TH = arguments[0].flatten(0, -2)
        return best_experts(router.layer(hidden_TH), router.top_k)


class Llama4(Container):
    """Llama 4: every expert gets every token, scaled by its score, which is zero unless chosen."""

    def num_experts(self, module: Any) -> int:
        return int(module.num_experts)

    def rows(self, layer: MoELayer, arguments: tuple[Any, ...]) -> Routes:
        chosen_ET = self._chosen(layer, arguments[0])
        numbers_E1 = torch.arange(len(chosen_ET), device=chosen_ET.device)[:, None]
        experts_N1 = torch.where(chosen_ET, numbers_E1, NO_EXPERT).view(-1, 1)
        return Routes(experts_N1, arguments[0].new_ones(len(experts_N1), 1))

    def routes(self, layer: MoELayer, arguments: tuple[Any, ...]) -> Routes:
        """The router's decision. Weights are 1: scores have scaled the hidden states already."""
        chosen_TK, experts_TK = self._chosen(layer, arguments[0]).T.int().topk(layer.top_k, dim=-1)
        experts_TK = torch.where(chosen_TK > 0, experts_TK, NO_EXPERT)
        return Routes(experts_TK, arguments[0].new_ones(experts_TK.shape))

    def tokens(self, layer: MoELayer, arguments: tuple[Any, ...]) -> tuple[Tensor, Routes]:
        """Of a top-1 router: a token is what its one expert gets of it."""
        hidden_ETH = arguments[0].view(layer.num_experts, -1, arguments[0].shape[-1])
        return hidden_ETH.sum(0), self.routes(layer, arguments)

    def output(self, layer: MoELayer, arguments: tuple[Any, ...], sums_TH: Tensor) -> Tensor:
        """The block sums over experts: one of them has it all."""
        output_NH = torch.zeros_like(arguments[0])
        output_NH[: len(sums_TH)] = sums_TH
        return output_NH

    def _chosen(self, layer: MoELayer, hidden_NH: Tensor) -> Tensor:
        return (hidden_NH != 0).any(-1).view(layer.num_experts, -1)


class Switch(Container):
    """Switch Transformers: top-1; tokens beyond an expert's capacity are dropped."""

    def num_experts(self, module: Any) -> int:
        return sum(name.startswith("expert_") for name, _ in module.named_children())

    def names(self, module: nn.Module) -> list[str]:
        return [name for name, _ in module.get_submodule("expert_0").named_parameters()]

    def path(self, name: str, expert: int) -> str:
        return f"expert_{expert}.{name}"

    def part(self, tensor: Tensor, expert: int, num_experts: int) -> Tensor:
        return tensor

    def rows(self, layer: MoELayer, arguments: tuple[Any, ...]) -> Routes:
        _, onehot_T1E, weights_T1 = arguments
        chosen_TE = onehot_T1E[:, 0]
        experts_T = torch.where(chosen_TE.sum(-1) > 0, chosen_TE.argmax(-1), NO_EXPERT)
        return Routes(experts_T[:, None], weights_T1)


class Nllb(Switch):
    """NLLB-MoE: top-2, with a defect of transformers (5.17 to 5.23 at least) that `rows` repeats.

    The experts call takes the one-hot mask of the first choice for a list of expert ids. So it runs
    only two experts: 1, weighted by the first choice's gate, and 0, weighted by the second's.
    """

    def rows(self, layer: MoELayer, arguments: tuple[Any, ...]) -> Routes:
        experts: Any = layer.module
        _, top1_TE, gates_TE = arguments
        first_T, all_T = (top1_TE * gates_TE).sum(-1), gates_TE.sum(-1)
        weights_TK = torch.stack([first_T, all_T - first_T], dim=-1)
        experts_TK = torch.tensor([1, 0], device=top1_TE.device).expand(len(top1_TE), 2)
        kept = 1 if experts.training else 1 - experts.moe_token_dropout
        return Routes(experts_TK, weights_TK * kept)

    def routes(self, layer: MoELayer, arguments: tuple[Any, ...]) -> Routes:
        weights_TK, experts_TK = arguments[2].topk(layer.top_k, dim=-1)
        return Routes(torch.where(weights_TK > 0, experts_TK, NO_EXPERT), weights_TK)


CONTAINERS: dict[str, Container] = {
    "fused": Container(),
    "longcat": Longcat(),
    "dbrx": Dbrx(),
    "aria": Aria(),
    "jetmoe": JetMoe(),
    "llama4": Llama4(),
    "switch": Switch(),
    "nllb": Nllb(),
}
"""Kind of an MoE layer -> its layout."""
