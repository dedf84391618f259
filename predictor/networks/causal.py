"""The causal route predictor: a small transformer over token ids and the routes taken so far.

Symbols: B rows, T new tokens, P cached tokens, L MoE layers, E experts a layer, K experts a token,
D width, R rank of the token embedding, X = L * E expert keys.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor, nn

from predictor.networks.attention import KeysValues, RMSNorm, rotation_of, sliding_mask
from predictor.networks.block import Block
from predictor.networks.interface import CacheShape, PredictorSettings, RoutePredictor, read_out_map
from predictor.networks.windows import Predictions, PredictorShape, Windows
from routing.predictor_file.format import HEADS
from routing.topology import NO_EXPERT


@dataclass(frozen=True, kw_only=True)
class CausalSettings(PredictorSettings):
    """A causal transformer with a key/value cache."""

    width: int = 256
    """Width of the hidden states (D)."""
    blocks: int = 4
    """Transformer blocks."""
    attention_heads: int = 4
    """Attention heads of a block; they divide the width."""
    kv_heads: int = 2
    """Key and value heads, each shared by a group of attention heads; they divide these."""
    mlp_ratio: float = 4.0
    """Width of a block's MLP, as a multiple of the width."""
    stages: int = 1
    """Groups of layers in which this token's experts are read out, earlier layers after earlier
    blocks: the traced model, too, has chosen them before it computes the rest."""
    embedding_rank: int = 256
    """Rank of the token embedding: stored as [vocabulary, rank], projected to the width."""
    dropout: float = 0.0
    """Dropout in training, of the input and of each block's output."""

    def __post_init__(self) -> None:
        if self.width % (2 * self.attention_heads):
            raise ValueError(
                f"width {self.width} does not split into {self.attention_heads} attention heads "
                "of even size; change predictor.width or predictor.attention_heads"
            )

        if self.attention_heads % self.kv_heads:
            raise ValueError(
                f"{self.attention_heads} attention heads cannot share {self.kv_heads} heads of "
                "keys and values evenly; change predictor.attention_heads or predictor.kv_heads"
            )

        if not 1 <= self.stages <= self.blocks:
            raise ValueError(
                f"{self.stages} stages do not fit {self.blocks} blocks; predictor.stages is at "
                "least 1 and at most predictor.blocks"
            )

    @property
    def queries_per_key(self) -> int:
        """Attention heads that share a key/value head (G)."""
        return self.attention_heads // self.kv_heads

    def early_stages(self, num_layers: int) -> dict[int, int]:
        """Number of blocks -> MoE layers to read out after them, for all stages but the last."""
        stages = self.stages
        ends = [num_layers * stage // stages for stage in range(stages + 1)]
        blocks = [-(-self.blocks * (stage + 1) // stages) for stage in range(stages)]
        sizes = [stop - start for start, stop in pairwise(ends)]
        early = zip(blocks[:-1], sizes[:-1], strict=True)
        return {after: size for after, size in early if size}

    def block(self) -> Block:
        """A block with fresh weights."""
        return Block(
            self.width,
            heads=self.attention_heads,
            kv_heads=self.kv_heads,
            hidden=int(self.mlp_ratio * self.width),
            dropout=self.dropout,
            depth=self.blocks,
        )

    def build(self, shape: PredictorShape) -> "CausalPredictor":
        return CausalPredictor(shape, self)


class EarlyHead(nn.Sequential):
    """Reads the experts of the next `num_layers` MoE layers out of a block's output [B, T, D]."""

    def __init__(self, shape: PredictorShape, width: int, num_layers: int) -> None:
        super().__init__(RMSNorm(width), read_out_map(shape, width, num_layers))


class CausalPredictor(RoutePredictor):
    """The embeddings of token and route history, transformer blocks, and the heads."""

    kind = "causal"
    graph_inputs: ClassVar[dict[str, dict[int, str]]] = {
        "token_ids": {0: "batch", 1: "tokens"},
        "routes": {0: "batch", 1: "tokens"},
        "positions": {0: "batch", 1: "tokens"},
        "past": {2: "batch", 4: "past"},
        "past_positions": {0: "batch", 1: "past"},
    }
    graph_outputs = (*HEADS, "present")

    def __init__(self, shape: PredictorShape, settings: CausalSettings) -> None:
        stages = settings.early_stages(shape.num_layers)
        super().__init__(shape, width=settings.width, read_early=sum(stages.values()))
        self.settings = settings
        width, rank = settings.width, settings.embedding_rank
        self.embedding_VR = nn.Embedding(shape.vocab_size, rank)
        self.project_embedding = nn.Linear(rank, width, bias=False)
        self.history_XD = nn.Parameter(torch.empty(shape.num_layers * shape.num_experts, width))
        self.unknown_history_D = nn.Parameter(torch.zeros(width))
        self.dropout = nn.Dropout(settings.dropout)
        self.blocks = nn.ModuleList(settings.block() for _ in range(settings.blocks))
        self.early_heads = nn.ModuleDict(
            {str(after): EarlyHead(shape, width, layers) for after, layers in stages.items()}
        )
        self.norm = RMSNorm(width)
        self._initialise()

    def _initialise(self) -> None:
        """Initialise the embeddings; the history starts at half the scale of the token."""
        routes_a_token = self.shape.num_layers * self.shape.top_k
        nn.init.normal_(self.history_XD, std=0.5 * routes_a_token**-0.5)
        nn.init.normal_(self.embedding_VR.weight)
        nn.init.normal_(self.project_embedding.weight, std=self.settings.embedding_rank**-0.5)

    def set_embedding(self, embedding_VH: Tensor) -> None:
        """Start from the traced model's token embedding, cut to `embedding_rank` by an SVD.

        Scaled to unit variance. Raises ValueError when the vocabularies differ.
        """
        vocab_size, rank = self.embedding_VR.weight.shape
        if embedding_VH.shape[0] < vocab_size:
            raise ValueError(
                f"the embedding has {embedding_VH.shape[0]} rows, but the traced model's "
                f"vocabulary has {vocab_size}; name the directory of the model that was traced"
            )
        reduced_VR = truncated_svd(embedding_VH[:vocab_size].float(), rank)
        with torch.no_grad():
            self.embedding_VR.weight.zero_()
            self.embedding_VR.weight[:, : reduced_VR.shape[1]] = reduced_VR

    def hidden_matrices(self) -> list[nn.Parameter]:
        return [p for p in self.blocks.parameters() if p.dim() == 2]

    @property
    def cache(self) -> CacheShape:
        settings = self.settings
        channels = settings.width // settings.attention_heads
        return CacheShape(settings.blocks, settings.kv_heads, channels)

    def forward(self, batch: Windows) -> Predictions:
        mask_B1TT = sliding_mask(batch.positions_BT, batch.positions_BT, self.shape.window)
        predictions, _ = self.run_blocks(
            batch.token_ids_BT, batch.routes_BTLK, batch.positions_BT, mask_B1TT, None
        )
        return predictions

    def run_graph(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """One graph for prefill and decode steps: `past` may be empty, its entries in any order."""
        token_ids_BT, routes_BTLK, positions_BT, past, past_positions_BP = inputs
        window = self.shape.window
        key_positions_BS = torch.cat((past_positions_BP, positions_BT), dim=1)
        mask_B1TS = sliding_mask(positions_BT, key_positions_BS, window)
        mask_B1RS = mask_B1TS.repeat(1, 1, self.settings.queries_per_key, 1)
        cached = past.flatten(0, 1).unbind(0)  # one copy: slices of slices would be two
        pasts = [KeysValues(*pair) for pair in zip(cached[::2], cached[1::2], strict=True)]
        predictions, presents = self.run_blocks(
            token_ids_BT, routes_BTLK, positions_BT, mask_B1RS, pasts
        )
        present = torch.cat([tensor for pair in presents for tensor in pair])
        return (*predictions, present.unflatten(0, (len(presents), 2, -1)))

    def run_blocks(
        self,
        token_ids_BT: Tensor,
        routes_BTLK: Tensor,
        positions_BT: Tensor,
        mask: Tensor,
        pasts: list[KeysValues] | None,
    ) -> tuple[Predictions, list[KeysValues]]:
        """The predictions, and each block's new keys and values; see `Attention` for the mask."""
        x_BTD = self.project_embedding(self.embedding_VR(token_ids_BT))
        x_BTD = self.dropout(x_BTD + self.embed_history(routes_BTLK))
        rotation = rotation_of(positions_BT, self.cache.head_dim, x_BTD.dtype)
        mask = mask.to(x_BTD.dtype)
        presents, logits = [], []
        for i, block in enumerate(self.blocks):
            x_BTD, present = block(x_BTD, rotation, mask, pasts[i] if pasts else None)
            presents.append(present)
            if str(i + 1) in self.early_heads:
                logits.append(self.early_heads[str(i + 1)](x_BTD))
        logits.append(self.heads(self.norm(x_BTD)))
        return self.calibrated(torch.cat(logits, dim=-1)), presents

    def embed_history(self, routes_BTLK: Tensor) -> Tensor:
        """Sum of the vectors of the predecessor's experts; one vector where they are unknown."""
        shape = self.shape
        num_keys = shape.num_layers * shape.num_experts
        routes_BTLK = routes_BTLK.long()
        first_L1 = torch.arange(0, num_keys, shape.num_experts, device=routes_BTLK.device)[:, None]
        keys_BTLK = torch.where(routes_BTLK != NO_EXPERT, routes_BTLK + first_L1, num_keys)
        used = self.history_XD.new_zeros(*routes_BTLK.shape[:2], num_keys + 1)
        used_BTX = used.scatter(-1, keys_BTLK.flatten(2), 1.0)[..., :num_keys]
        known_BT1 = used_BTX.amax(-1, keepdim=True)
        return used_BTX @ self.history_XD + (1 - known_BT1) * self.unknown_history_D

    def random_inputs(self, batch: int, tokens: int, past: int) -> dict[str, Tensor]:
        """A prefill (past 0), or steps on a ring buffer in random order with an empty entry."""
        shape, (blocks, heads, channels) = self.shape, self.cache
        routes = torch.randint(
            NO_EXPERT, shape.num_experts, (batch, tokens, shape.num_layers, shape.top_k)
        )
        routes[:, ::2] = NO_EXPERT
        past_positions = torch.stack([torch.randperm(past) for _ in range(batch)])
        return {
            "token_ids": torch.randint(shape.vocab_size, (batch, tokens)),
            "routes": routes,
            "positions": torch.arange(past, past + tokens).repeat(batch, 1),
            "past": torch.randn(blocks, 2, batch, heads, past, channels),
            "past_positions": past_positions.where(past_positions != 1, -1),
        }


def truncated_svd(matrix_VH: Tensor, rank: int) -> Tensor:
    """The best [V, rank] linear summary of the rows, scaled to unit variance of all entries."""
    rank = min(rank, *matrix_VH.shape)
    _, vectors_HH = torch.linalg.eigh(matrix_VH.T @ matrix_VH)
    reduced_VR = matrix_VH @ vectors_HH[:, -rank:].flip(1)
    return reduced_VR / reduced_VR.std()
