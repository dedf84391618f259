"""The tokens of a step of sequences that are served: where each belongs, and what it sees."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from itertools import accumulate, repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from runtime.kv.own_attention import Attention
from runtime.kv.pages.places import Places, Spilled, WholeRows


class Span(NamedTuple):
    """The tokens of one sequence within a step."""

    row: int
    start: int
    """Tokens of the sequence that are in the cache already."""
    num_tokens: int
    """Tokens of this step."""


def zero_behind(copies: Tensor, positions_B: Tensor) -> Tensor:
    """Copies of rows [B, ..., context, width], zero behind these positions.

    What is behind them may be anything, and a mask does not keep a NaN from a sum.
    """
    columns_C = torch.arange(copies.shape[-2], device=copies.device)
    behind_BC = columns_C > positions_B[:, None]
    shape = len(copies), *[1] * (copies.dim() - 3), copies.shape[-2], 1
    return copies.masked_fill_(behind_BC.view(shape), 0)


class PromptBatch(NamedTuple):
    """Sequences of about one length that begin in a step, for their attention together.

    A row of the batch is a sequence, filled up at its end with tokens that nobody sees.
    """

    longest: int
    rows_N: Tensor
    lasts_N: Tensor
    """The position of each sequence's last token."""
    given_NT: Tensor
    """int64 [N, longest], which of the step's tokens each is; the first, where it is filled up."""
    places_P: Tensor
    """int64, where the P tokens of the sequences are among all N * longest."""
    tokens_P: Tensor
    """Which of the step's tokens they are."""

    @classmethod
    def of(cls, spans: Sequence[tuple[int, Span]], device: torch.device) -> PromptBatch:
        """spans: with the number of the first token of each."""
        longest = max(span.num_tokens for _, span in spans)
        rows = [span.row for _, span in spans]
        lasts = [span.num_tokens - 1 for _, span in spans]
        tokens = [first + i for first, span in spans for i in range(span.num_tokens)]
        places = [n * longest + i for n, last in enumerate(lasts) for i in range(last + 1)]
        given = torch.tensor([first for first, _ in spans]).repeat_interleave(longest)
        given[places] = torch.tensor(tokens)
        numbers = (torch.tensor(one, device=device) for one in (rows, lasts, places, tokens))
        rows_N, lasts_N, places_P, tokens_P = numbers
        given_NT = given.view(-1, longest).to(device)
        return cls(longest, rows_N, lasts_N, given_NT, places_P, tokens_P)


class RaggedTokens(ABC):
    """The tokens of a step, of any rows: side by side [1, T], or stacked, one of each row [T, 1].

    is_new: whether they begin their sequences. is_one_sequence: whether there is but one.
    """

    def __init__(
        self, rows_B: Tensor, positions_B: Tensor, *, stacked: bool, is_new: bool = False,
        is_one_sequence: bool = False,
    ) -> None:  # fmt: skip
        self.rows_B, self.positions_B, self._stacked = rows_B, positions_B, stacked
        self.is_new, self.is_one_sequence = is_new, is_one_sequence
        self.places: Places = WholeRows()
        """Of the cache that the tokens attend to."""

    def shaped(self, values_T: Tensor) -> Tensor:
        """What is one for each token as the model takes it."""
        return values_T[:, None] if self._stacked else values_T[None]

    def seen(self, context: int) -> Tensor:
        """Who sees whom, bool: of stacked tokens [T, 1, 1, context], of one sequence's [1, 1, T,
        all tokens].
        """
        columns_C = torch.arange(context, device=self.rows_B.device)
        return (columns_C <= self.positions_B[:, None])[:, None, None]

    def gathered(self, states: Tensor) -> Tensor:
        """Of states [R, ..., context, width], those of the tokens' sequences."""
        return zero_behind(states[self.rows_B], self.positions_B)

    @abstractmethod
    def write(self, keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor) -> None:
        """Write the tokens' keys and values to a layer's memory, which `places` knows."""

    @abstractmethod
    def attend(
        self,
        function: Attention,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        **kwargs: Any,
    ) -> Tensor:
        """From queries [1, heads, T, width] and all rows of a layer to [1, T, heads, width], or
        from [T, heads, 1, width] to [T, 1, heads, width]. chunk: tokens that see each other only.
        seen: of a layer that chooses, from what the method says. gathered: keys and values are
        those of the tokens' sequences already. spilled: the layer's pages in host memory.
        """


class TokenLayout(RaggedTokens):
    """Where each of a step's tokens belongs.

    attend_singles: attention of single tokens together, as
    `runtime.cuda.decode.row_decoder` has it; it serves the spans of one token that come first.
    stacked: the tokens are a batch [T, 1] of one token of each sequence.
    """

    def __init__(
        self,
        spans: Sequence[Span],
        device: torch.device,
        attend_singles: Callable[..., Tensor] | None = None,
        *,
        stacked: bool = False,
    ) -> None:
        rows = [span.row for span in spans for _ in range(span.num_tokens)]
        positions = [span.start + i for span in spans for i in range(span.num_tokens)]
        super().__init__(
            *torch.tensor([rows, positions], device=device), stacked=stacked,
            is_new=not any(span.start for span in spans), is_one_sequence=len(spans) == 1,
        )  # fmt: skip
        self.spans, self._attend_singles = spans, attend_singles
        ends = (index for index, span in enumerate(spans) if span.num_tokens > 1)
        self._num_singles = 0 if attend_singles is None else next(ends, len(spans))
        self._masks: dict[tuple[Span, int | None, int | None], Tensor] = {}
        self._batches = [] if stacked else self._prompt_batches(device)

    def _prompt_batches(self, device: torch.device) -> list[PromptBatch]:
        """All spans behind the single tokens by length, up to twice the shortest together; none
        where some go on from tokens before, or there is but one.
        """
        firsts = accumulate((span.num_tokens for span in self.spans), initial=0)
        prompts = [*zip(firsts, self.spans, strict=False)][self._num_singles :]
        if len(prompts) < 2 or any(span.start for _, span in prompts):
            return []
        prompts.sort(key=lambda prompt: prompt[1].num_tokens)
        batches: list[list[tuple[int, Span]]] = []
        for prompt in prompts:
            if not batches or prompt[1].num_tokens > 2 * batches[-1][0][1].num_tokens:
                batches.append([])
            batches[-1].append(prompt)
        return [PromptBatch.of(batch, device) for batch in batches]

    def write(self, keys: Tensor, values: Tensor, new_keys: Tensor, new_values: Tensor) -> None:
        """Keys and values [1, heads, T, width] or [T, heads, 1, width] to rows and positions."""
        at_B, within_B = self.places.at(self.rows_B, self.positions_B)
        for stored, new in ((keys, new_keys), (values, new_values)):
            stored[at_B, :, within_B] = new.transpose(1, 2).flatten(0, 1)

    def seen(self, context: int) -> Tensor:
        if self._stacked:
            return super().seen(context)
        (span,) = self.spans
        mask = self.mask(span, None)
        length = span.start + span.num_tokens
        return self.rows_B.new_ones(1, 1, 1, length, dtype=torch.bool) if mask is None else mask

    def gathered(self, states: Tensor) -> Tensor:
        if self._stacked:
            return super().gathered(states)
        (span,) = self.spans
        return states[span.row : span.row + 1, ..., : span.start + span.num_tokens, :]

    def mask(self, span: Span, window: int | None, chunk: int | None = None) -> Tensor | None:
        """Who sees whom, bool [1, 1, new, all tokens]; None where everything is seen."""
        length = span.start + span.num_tokens
        is_all = (window is None or length <= window) and (chunk is None or length <= chunk)
        if span.num_tokens == 1 and is_all:
            return None
        if (span, window, chunk) not in self._masks:
            positions = torch.arange(length, device=self.rows_B.device)
            query, key = positions[span.start :, None], positions[None]
            seen = key <= query
            if window is not None:
                seen &= key > query - window
            if chunk is not None:
                seen &= key >= query - query % chunk
            self._masks[span, window, chunk] = seen[None, None]
        return self._masks[span, window, chunk]

    def attend(
        self,
        function: Attention,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        chunk: int | None = None,
        seen: Tensor | None = None,
        gathered: bool = False,
        spilled: Spilled | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """`function`, once a sequence, with the masks of this layout."""
        dim, outputs, at = (0 if self._stacked else 1), list[Tensor](), self._num_singles
        window = kwargs.get("sliding_window")

        def attended(queries: Tensor, *others: Tensor | None) -> Tensor:
            output: Tensor = function(module, queries, *others, **kwargs)[0]
            return output

        if seen is not None or chunk is not None:
            at = 0
        elif self._attend_singles is not None and at:
            singles = query.narrow(0 if self._stacked else 2, 0, at)
            rows_B = torch.arange(at, device=key.device) if gathered else self.rows_B[:at]
            given = rows_B, self.positions_B[:at], self.places, None, spilled
            outputs.append(self._attend_singles(singles, key, value, *given, **kwargs))
        if self._batches and at == self._num_singles and seen is None and not gathered:
            together = self._attend_batches(attended, query, key, value, window, chunk)
            return torch.cat([*outputs, together[:, at:]], dim)
        for index, span in enumerate(self.spans[at:], at):
            length = span.start + span.num_tokens
            if self._stacked:
                queries = query[index : index + 1]
            else:
                queries = query[:, :, at : at + span.num_tokens]
            if seen is None:
                mask = self.mask(span, window, chunk)
            else:
                mask = seen[index : index + 1, ..., :length] if self._stacked else seen
            row, places = (index, WholeRows()) if gathered else (span.row, self.places)
            memory = zip((key, value), spilled or repeat(None), strict=False)
            states = [places.row(stored, row, length, others) for stored, others in memory]
            outputs.append(attended(queries, *states, mask))
            at += span.num_tokens
        return torch.cat(outputs, dim)

    def _attend_batches(
        self, attended: Callable[..., Tensor], query: Tensor, key: Tensor, value: Tensor,
        window: int | None, chunk: int | None,
    ) -> Tensor:  # fmt: skip
        """[1, T, heads, width], of the tokens of prompts alone."""
        output = query.new_zeros(1, query.shape[2], query.shape[1], value.shape[-1])
        for batch in self._batches:
            queries = query[0][:, batch.given_NT].transpose(0, 1)
            states = [
                zero_behind(self.places.copies(stored, batch.rows_N, batch.longest), batch.lasts_N)
                for stored in (key, value)
            ]
            mask = self.mask(Span(0, 0, batch.longest), window, chunk)
            found = attended(queries, *states, mask).flatten(0, 1)
            output[0].index_copy_(0, batch.tokens_P, found.index_select(0, batch.places_P))
        return output
