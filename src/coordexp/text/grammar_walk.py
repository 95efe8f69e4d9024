"""The state of one answer within the grammar: which tokens are allowed next, given the emitted tokens.

Before a piece is allowed, the walk checks that the tokens needed to finish the answer after it still fit the budget.
So the set of allowed tokens is never empty, and no answer is truncated.

Shapes: V tokens of the vocabulary, K values of a coordinate.
"""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from coordexp.geometry.boxes import as_boxes, pairwise_iou
from coordexp.text.grammar import MAX_NAME_TOKENS, NO_DUPLICATE_GUARD, UTF8_RESERVE, AnswerGrammar, Ids, utf8_tail

Target = Literal["name", "value", "end"]


@dataclass(frozen=True, slots=True)
class _Branch:
    """A sequence of tokens that may follow, the state that it leads to, and the name that it spells, if any."""

    ids: Ids
    target: Target
    name: str | None = None


class AnswerWalk:
    """State of one answer: call `allowed()` before each token, `advance(token)` after it."""

    def __init__(self, grammar: AnswerGrammar) -> None:
        self._grammar = grammar
        self._state: Literal["branches", "name", "value", "end"] = "branches"
        self._taken = 0  # number of emitted tokens of the live branches
        self._name = b""
        self._name_tokens = 0
        self._box: list[int] = []
        self._prefix: Ids = ()  # emitted tokens of the current value
        self._boxes_of: dict[str, list[list[int]]] = {}
        self._remaining = grammar.decode.max_new_tokens
        pieces = grammar.pieces
        self._branches = [_Branch(pieces.opening, "name"), _Branch(pieces.empty, "end")]

    def copy(self) -> AnswerWalk:
        """An independent copy of this walk, for beam search."""
        copied = copy(self)
        copied._box, copied._boxes_of = [*self._box], {name: [*boxes] for name, boxes in self._boxes_of.items()}
        return copied

    @property
    def ended(self) -> bool:
        """Whether the end-of-turn token has been emitted."""
        return self._state == "end"

    def allowed(self) -> NDArray[np.bool_]:
        """Mask of the tokens that may come next, (V,); never empty. After the end, only the end-of-turn token."""
        mask = np.zeros(self._grammar.n_tokens, dtype=bool)
        if self._state == "end":
            mask[self._grammar.end_id] = True
        elif self._state == "name":
            mask = self._allowed_in_name()
        elif self._state == "value":
            mask[self._next_value_tokens()] = True
        else:
            self._allow_branches(mask, self._branches, self._taken)
        return mask

    def advance(self, token_id: int) -> None:
        """Take an allowed token; tokens after the end (padding) are ignored."""
        self._remaining -= 1
        if self._state == "name":
            self._advance_name(token_id)
        elif self._state == "value":
            self._advance_value(token_id)
        elif self._state == "branches":
            self._advance_branches(token_id)

    # Pieces

    def _allow_branches(self, mask: NDArray[np.bool_], branches: Iterable[_Branch], taken: int) -> None:
        for branch in branches:
            if len(branch.ids) - taken + self._cost_of(branch.target) <= self._remaining:
                mask[branch.ids[taken]] = True

    def _cost_of(self, target: Target) -> int:
        """Upper bound of the tokens needed after a branch to finish the answer."""
        grammar = self._grammar
        if target == "end":
            return 0
        if target == "name":
            return grammar.cost_of_name
        return grammar.value_cost + grammar.cost_after_value(len(self._box))

    def _advance_branches(self, token_id: int) -> None:
        # Several branches can share a prefix of tokens (`]}` of "again" and "stop"): keep all that still match.
        live = [b for b in self._branches if b.ids[self._taken] == token_id]
        assert live, f"token {token_id} is not allowed here"
        self._branches, self._taken = live, self._taken + 1
        finished = [b for b in live if len(b.ids) == self._taken]
        if finished:
            self._enter(finished[0])

    def _enter(self, branch: _Branch) -> None:
        if branch.name is not None:
            self._name = branch.name.encode()
        if branch.target == "end":
            self._state = "end"
        elif branch.target == "value":
            self._state, self._prefix = "value", ()
        else:
            self._begin_name()

    def _follow(self, branches: list[_Branch]) -> None:
        self._state, self._branches, self._taken = "branches", branches, 0

    # Names

    def _begin_name(self) -> None:
        names, middle = self._grammar.names, self._grammar.pieces.middle
        self._name, self._name_tokens, self._box = b"", 0, []
        if names is None:
            self._state = "name"
        else:
            self._follow([_Branch(ids + middle, "value", name) for name, ids in names.items()])

    def _allowed_in_name(self) -> NDArray[np.bool_]:
        grammar, tail = self._grammar, utf8_tail(self._name)
        assert tail is not None
        if not self._name:
            return grammar.first_of_name
        mask = grammar.after_tail(tail).copy()
        # When name length or budget run out, the name may only be completed: first its last character, then `middle`.
        needed = 1 + UTF8_RESERVE + len(grammar.pieces.middle) + grammar.cost_after_middle
        if self._name_tokens >= MAX_NAME_TOKENS or self._remaining < needed:
            mask &= grammar.single_bytes if tail else False
        if not tail:
            mask[grammar.pieces.middle[0]] = True
        return mask

    def _advance_name(self, token_id: int) -> None:
        middle = self._grammar.pieces.middle
        if self._name and token_id == middle[0]:
            self._follow([_Branch(middle, "value")])
            self._advance_branches(token_id)
        else:
            self._name += self._grammar.bytes_of(token_id)
            self._name_tokens += 1

    # Values

    def _next_value_tokens(self) -> NDArray[np.int64]:
        following = self._grammar.next_of_value(self._prefix)
        allowed_K = self._allowed_values()
        tokens = following[allowed_K & (following >= 0)]
        value = self._grammar.value_of.get(self._prefix)
        if value is None or not allowed_K[value]:
            return tokens
        # The prefix is a complete value already ("12" of "123"): the next piece may follow, too.
        after = np.zeros(self._grammar.n_tokens, dtype=bool)
        self._allow_branches(after, self._after_value(), 0)
        return np.concatenate([tokens, np.flatnonzero(after)])

    def _advance_value(self, token_id: int) -> None:
        longer = (*self._prefix, token_id)
        following = self._grammar.next_of_value(self._prefix)
        if (following == token_id).any():
            self._prefix = longer
            if not (self._grammar.next_of_value(longer) >= 0).any():
                self._end_value()
            return
        # A number that could have had more digits: this token belongs to the next piece already.
        self._end_value()
        self._advance_branches(token_id)

    def _end_value(self) -> None:
        follow_up = self._after_value()
        self._box.append(self._grammar.value_of[self._prefix])
        if len(self._box) == 4:
            self._boxes_of.setdefault(self._key(), []).append(self._box)
        self._prefix = ()
        if follow_up[0].ids:
            self._follow(follow_up)
        else:
            self._enter(follow_up[0])

    def _after_value(self) -> list[_Branch]:
        """The pieces that may follow the current value, which is not in the box yet."""
        pieces = self._grammar.pieces
        if len(self._box) < 3:
            return [_Branch(pieces.separator, "value")]
        return [_Branch(pieces.again, "name"), _Branch(pieces.stop, "end")]

    def _allowed_values(self) -> NDArray[np.bool_]:
        """Values of the current coordinate that satisfy `corners` and `duplicate_iou`, (K,); never empty.

        At y2, values are excluded whose box overlaps an earlier box of the same name too much; if that excludes all
        values, the one with the lowest overlap stays. At x1 and y1, the last value is excluded: no x2 or y2 fits after.
        """
        decode, axis = self._grammar.decode, len(self._box)
        values_K = np.arange(len(self._grammar.values))
        allowed_K = np.ones(len(values_K), dtype=bool)
        if decode.corners == "valid":
            allowed_K = values_K > self._box[axis - 2] if axis >= 2 else values_K < values_K[-1]
        earlier = self._boxes_of.get(self._key(), []) if axis == 3 else []
        if decode.duplicate_iou < NO_DUPLICATE_GUARD and earlier:
            candidates_K4 = np.column_stack([np.tile(self._box, (len(values_K), 1)), values_K])
            overlap_K = pairwise_iou(as_boxes(candidates_K4), as_boxes(earlier)).max(axis=1)
            fresh_K = allowed_K & (overlap_K <= decode.duplicate_iou)
            lowest = values_K == np.where(allowed_K, overlap_K, np.inf).argmin()
            allowed_K = fresh_K if fresh_K.any() else lowest
        return allowed_K

    def _key(self) -> str:
        """The name for the comparison of duplicates: case and spacing are ignored."""
        return " ".join(self._name.decode(errors="replace").lower().split())
