"""The coordinate embedding rows of a frozen table as a small separate parameter.

The 1000 coordinate rows of embedding and head are trained in every mode (models/adapters.py). If the rest of the table
is frozen, gradients and moments of the whole table would take 150 times the memory needed, and assembling the table in
every forward pass would copy it. Here the rows are a parameter next to the table, in float32 even if the table is in
bfloat16, and are copied into the table before the head uses it.

With tied weights (Press and Wolf, arXiv:1608.05859), embedding and head share one table and one such parameter, so the
rows receive the sum of both gradients, as in full training.

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
    """A frozen embedding or head that uses the trained `rows` (K, D) in place of its coordinate rows.

    `base_layer`, `merge` and `get_base_layer` are the interface of PEFT's layers, so that code that merges adapters
    merges these rows, too.
    """

    def __init__(self, table: Table, span: slice, rows: nn.Parameter) -> None:
        super().__init__()
        self.base_layer = table
        self.rows = rows
        self._span = span

    @property
    def weight(self) -> Tensor:
        """The complete table (V, D) with the present coordinate rows, without a gradient."""
        self.merge()
        return self.base_layer.weight

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Copy the rows into the table; the arguments exist for PEFT's interface and are ignored."""
        # Through `.data`, so that autograd's version counter does not change: within a step, the values are the same.
        self.base_layer.weight.data[self._span] = self.rows.data.to(self.base_layer.weight.dtype)

    def get_base_layer(self) -> Table:
        """The table; part of PEFT's interface."""
        return self.base_layer

    def forward(self, given: Tensor) -> Tensor:
        """Embeddings of token ids, or logits of hidden states; both with a gradient for the rows."""
        return self._embed(given) if isinstance(self.base_layer, nn.Embedding) else self._logits(given)

    def _embed(self, ids: Tensor) -> Tensor:
        at = ids - self._span.start
        # Both lookups run for all tokens, and `where` selects: the gradient of each reaches only the selected tokens.
        is_coord = (at >= 0) & (at < len(self.rows))
        others = F.embedding(ids, self.base_layer.weight)
        own = F.embedding(at.clamp(0, len(self.rows) - 1), self.rows)
        return torch.where(is_coord[..., None], own.to(others.dtype), others)

    def _logits(self, hidden: Tensor) -> Tensor:
        logits = F.linear(hidden, self.weight)
        if not torch.is_grad_enabled():
            return logits
        # The coordinate logits again, now with a gradient for the rows: 1000 of 152k columns.
        own = F.linear(hidden, self.rows).to(logits.dtype)
        return torch.cat([logits[..., : self._span.start], own, logits[..., self._span.stop :]], dim=-1)


def train_rows_alone(model: Qwen3VLForConditionalGeneration, coord: CoordVocabulary) -> None:
    """Freeze embedding and head except for their coordinate rows, in place; tied tables share the rows."""
    language, span = model.model.language_model, slice(coord.first_id, coord.end_id)
    tables: tuple[Table, Table] = language.embed_tokens, model.lm_head
    # Keyed by the identity of the weight: tied tables are one tensor and get one parameter.
    rows: dict[int, nn.Parameter] = {}
    for table in tables:
        weight = table.weight.requires_grad_(False)
        if id(weight) not in rows:
            rows[id(weight)] = nn.Parameter(weight[span].detach().to(torch.float32, copy=True))
    wrapped = [CoordinateRows(table, span, rows[id(table.weight)]) for table in tables]
    language.embed_tokens, model.lm_head = wrapped


def put_rows_back(model: Qwen3VLForConditionalGeneration) -> None:
    """Undo `train_rows_alone`: restore plain tables that contain the trained rows."""
    language = model.model.language_model
    for wrapped in (cast(CoordinateRows, language.embed_tokens), cast(CoordinateRows, model.lm_head)):
        wrapped.merge()
    language.embed_tokens, model.lm_head = language.embed_tokens.base_layer, model.lm_head.base_layer


def coordinate_rows(table: nn.Module, span: slice) -> Tensor:
    """The coordinate rows (K, D) of an embedding or a head, with their gradient, wrapped or not."""
    return table.rows if isinstance(table, CoordinateRows) else cast(Table, table).weight[span]
