"""The predictor of the ExpertFlow paper (arXiv 2410.17954, section 3.2): a small T5.

The encoder reads the prompt. The decoder reads the generated tokens and predicts the experts of
each at all MoE layers in one pass. This version adds what the interface asks for: heads for the
next token and the horizons, and predictions for prompt tokens. For these the decoder also reads the
prompt, as a segment of its own. Generated tokens do not attend to that segment, so that for them it
is exactly the paper's decoder; the loss counts them alone (`trained_BT`).

Symbols: B rows, T tokens, S keys, L MoE layers, E experts a layer, D width.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import T5Config
from transformers.models.t5.modeling_t5 import T5Stack

from predictor.networks.interface import PredictorSettings, RoutePredictor
from predictor.networks.windows import Predictions, PredictorShape, Windows
from routing.predictor_file.format import HEADS

HIDDEN_SCORE = -1e9


@dataclass(frozen=True, kw_only=True)
class T5Settings(PredictorSettings):
    """The paper's T5-style encoder-decoder; the defaults are its sizes."""

    width: int = 32
    """Width of the hidden states (d_model)."""
    mlp_width: int = 2048
    """Width inside a block's MLP (d_ff)."""
    blocks: int = 6
    """Encoder blocks, and as many decoder blocks."""
    attention_heads: int = 8
    """Attention heads of a block."""
    head_width: int = 64
    """Channels of an attention head (d_kv)."""
    dropout: float = 0.1
    """Dropout in training, as in T5."""

    def build(self, shape: PredictorShape) -> "T5Predictor":
        return T5Predictor(shape, self)

    def stack(self, *, decoder: bool) -> T5Stack:
        """T5's encoder or decoder, randomly initialised, taking embeddings instead of ids."""
        config = T5Config(
            vocab_size=1,
            d_model=self.width,
            d_ff=self.mlp_width,
            d_kv=self.head_width,
            num_layers=self.blocks,
            num_heads=self.attention_heads,
            dropout_rate=self.dropout,
            is_decoder=decoder,
            is_encoder_decoder=False,
            eos_token_id=None,
            use_cache=False,
            attn_implementation="eager",  # type: ignore[call-arg]
        )
        stack = T5Stack(config)
        stack.set_input_embeddings(nn.Identity())
        return stack


class T5Predictor(RoutePredictor):
    """T5 encoder over the prompt, T5 decoder over every token, a bias-free map to the heads."""

    kind = "t5"
    graph_inputs: ClassVar[dict[str, dict[int, str]]] = {
        "token_ids": {0: "batch", 1: "tokens"},
        "positions": {0: "batch", 1: "tokens"},
        "prompt_lengths": {0: "batch"},
    }
    graph_outputs = HEADS

    def __init__(self, shape: PredictorShape, settings: T5Settings) -> None:
        super().__init__(shape, width=settings.width)
        self.settings = settings
        self.heads = nn.Linear(settings.width, self.heads.out_features, bias=False)
        self.embedding_VD = nn.Embedding(shape.vocab_size, settings.width)
        self.encoder = settings.stack(decoder=False)
        self.decoder = settings.stack(decoder=True)

    @property
    def cache(self) -> None:
        """None: the graph runs over the whole window each time."""
        return None

    def forward(self, batch: Windows) -> Predictions:
        return self.predict(batch.token_ids_BT, batch.positions_BT, batch.prompt_lengths_B)

    def run_graph(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """`prompt_lengths` [B] counts a row's leading prompt columns, padding included."""
        return tuple(self.predict(*inputs))

    def trained_BT(self, batch: Windows) -> Tensor:
        """The generated tokens."""
        return batch.valid_BT & ~prompt_mask(batch.positions_BT, batch.prompt_lengths_B)

    def predict(
        self, token_ids_BT: Tensor, positions_BT: Tensor, prompt_lengths_B: Tensor
    ) -> Predictions:
        """Predict every token; the arguments are the graph's inputs."""
        prompt_BT = prompt_mask(positions_BT, prompt_lengths_B)
        masks = attention_masks(positions_BT, prompt_BT, self.shape.window)
        x_BTD = self.embedding_VD(token_ids_BT)
        encoded_BTD = self.encoder(
            inputs_embeds=x_BTD, attention_mask=masks.encoder_B1TT
        ).last_hidden_state
        decoded_BTD = self.decoder(
            inputs_embeds=x_BTD,
            attention_mask=masks.decoder_B1TT,
            encoder_hidden_states=nn.functional.pad(encoded_BTD, (0, 0, 0, 1)),
            encoder_attention_mask=masks.cross_B1TS,
        ).last_hidden_state
        return self.read_out(decoded_BTD)

    def random_inputs(self, batch: int, tokens: int, past: int) -> dict[str, Tensor]:
        """Rows with left padding and a prompt of any length, including none; there is no past."""
        padding_B1 = torch.randint(tokens, (batch, 1))
        positions = torch.arange(tokens).repeat(batch, 1) - padding_B1
        return {
            "token_ids": torch.randint(self.shape.vocab_size, (batch, tokens)),
            "positions": positions.clamp_(min=-1),
            "prompt_lengths": torch.randint(tokens + 1, (batch,)),
        }


@dataclass(frozen=True)
class Masks:
    """Attention masks to add to scores: 0 for a visible key, HIDDEN_SCORE elsewhere."""

    encoder_B1TT: Tensor
    """Prompt tokens see the prompt, in both directions."""
    decoder_B1TT: Tensor
    """Tokens see earlier tokens of their own segment."""
    cross_B1TS: Tensor
    """Tokens see the encoded prompt; S = T + 1, see `attention_masks`."""


def prompt_mask(positions_BT: Tensor, prompt_lengths_B: Tensor) -> Tensor:
    """Mask [B, T] of the prompt: the first `prompt_lengths` columns without the padding."""
    columns_T = torch.arange(positions_BT.shape[1], device=positions_BT.device)
    return (positions_BT >= 0) & (columns_T < prompt_lengths_B[:, None])


def attention_masks(positions_BT: Tensor, prompt_BT: Tensor, window: int) -> Masks:
    """Masks of the three attentions. Tokens `window` or more positions apart never see each other.

    The encoder's output gets a last column of zeros, which adds nothing when attended to, since T5
    has no biases. Exactly the tokens that see no prompt attend to it.
    """
    distance_BTT = positions_BT[:, :, None] - positions_BT[:, None, :]
    valid_BT = positions_BT >= 0
    near_BTT = (distance_BTT.abs() < window) & valid_BT[:, :, None] & valid_BT[:, None, :]
    reads_prompt_BTT = near_BTT & prompt_BT[:, None, :]
    alone_BT1 = ~reads_prompt_BTT.any(-1, keepdim=True)
    same_segment_BTT = prompt_BT[:, :, None] == prompt_BT[:, None, :]
    return Masks(
        encoder_B1TT=_scores(reads_prompt_BTT & prompt_BT[:, :, None]),
        decoder_B1TT=_scores(near_BTT & (distance_BTT >= 0) & same_segment_BTT),
        cross_B1TS=_scores(torch.cat((reads_prompt_BTT, alone_BT1), dim=-1)),
    )


def _scores(visible_BTS: Tensor) -> Tensor:
    return (~visible_BTS).float()[:, None] * HIDDEN_SCORE
