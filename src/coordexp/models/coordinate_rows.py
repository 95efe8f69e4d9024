"""The coordinate rows of a frozen table as a small parameter of their own.

The 1000 coordinate rows of embedding and head train in every mode (models/adapters.py). Where the rest of the table is
frozen, gradient and moments of all of it would be 150 times what is needed, and a table put together anew in each
forward a copy of it. Here the rows stand beside the table, in float32 also if that is held in bfloat16, and are copied
into it for the products of the head.

Shapes: V vocabulary, D hidden size, K coordinate ids.
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Qwen3VLForConditionalGeneration

from coordexp.text.vocabulary import CoordVocabulary

Table = nn.Embedding | nn.Linear


class CoordinateRows(nn.Module):
    """An embedding or a head, frozen but for `rows` (K, D); in their place it computes with these.

    `base_layer` and the ways to it are PEFT's, so that whatever merges its adapters merges these rows, too.
    """

    def __init__(self, table: Table, span: slice, rows: nn.Parameter) -> None:
        super().__init__()
        self.base_layer = table
        self.rows = rows
        self._span = span

    @property
    def weight(self) -> Tensor:
        """The whole table (V, D), without a gradient, its coordinate rows as they are now."""
        self.merge()
        return self.base_layer.weight

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Give the table the rows as they are; arguments as of PEFT's layers, which have nothing to say here."""
        # As data, which counts as no change of the table: within a step the numbers are the same ones.
        self.base_layer.weight.data[self._span] = self.rows.data.to(self.base_layer.weight.dtype)

    def get_base_layer(self) -> Table:
        """The table, as PEFT asks for it."""
        return self.base_layer

    def forward(self, given: Tensor) -> Tensor:
        """Embeddings of token ids, or logits of hidden states; both with a gradient on the rows."""
        return self._embed(given) if isinstance(self.base_layer, nn.Embedding) else self._logits(given)

    def _embed(self, ids: Tensor) -> Tensor:
        at = ids - self._span.start
        is_coord = (at >= 0) & (at < len(self.rows))
        others = F.embedding(ids, self.base_layer.weight)
        own = F.embedding(at.clamp(0, len(self.rows) - 1), self.rows)
        return torch.where(is_coord[..., None], own.to(others.dtype), others)

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = F.linear(hidden, self.weight)
        if not torch.is_grad_enabled():
            return logits
        own = F.linear(hidden, self.rows).to(logits.dtype)
        return torch.cat([logits[..., : self._span.start], own, logits[..., self._span.stop :]], dim=-1)


def train_rows_alone(model: Qwen3VLForConditionalGeneration, coord: CoordVocabulary) -> None:
    """Freeze embedding and head but for their coordinate rows, in place; tied tables share them."""
    language, span = model.model.language_model, slice(coord.first_id, coord.end_id)
    tables: tuple[Table, Table] = language.embed_tokens, model.lm_head
    rows: dict[int, nn.Parameter] = {}
    for table in tables:
        weight = table.weight.requires_grad_(False)
        if id(weight) not in rows:
            rows[id(weight)] = nn.Parameter(weight[span].detach().to(torch.float32, copy=True))
    wrapped = [CoordinateRows(table, span, rows[id(table.weight)]) for table in tables]
    language.embed_tokens, model.lm_head = wrapped


def put_rows_back(model: Qwen3VLForConditionalGeneration) -> None:
    """Undo `train_rows_alone`: plain tables again, with the rows as they were trained."""
    language = model.model.language_model
    for wrapped in (cast(CoordinateRows, language.embed_tokens), cast(CoordinateRows, model.lm_head)):
        wrapped.merge()
    language.embed_tokens, model.lm_head = language.embed_tokens.base_layer, model.lm_head.base_layer


def coordinate_rows(table: nn.Module, span: slice) -> Tensor:
    """Rows (K, D) of the coordinate ids of an embedding or a head, with their gradient, however they are held."""
    return table.rows if isinstance(table, CoordinateRows) else cast(Table, table).weight[span]
