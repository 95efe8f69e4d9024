"""Re-scoring: the model's probabilities of given answers, for engines that do not return them.

One packed, teacher-forced forward gives the log-probability of every generated token and, at the coordinates of the
parsed objects, the distribution over the bins. These are the model's own probabilities at temperature 1 under the
training prompt, whichever engine, penalties or masks produced the tokens.

Shapes: S slots, A answer tokens, N objects of one answer, K bins.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from coordexp.geometry.bins import NUM_BINS
from coordexp.infra.device import inference_plan
from coordexp.models.forward import hidden_states, slot_logits
from coordexp.models.loading import Checkpoint, ModelFormat
from coordexp.packing.collator import Collator, Segment
from coordexp.packing.samples import Sample
from coordexp.rollout.engine import Generation
from coordexp.text.codecs import Role

_SLOTS_PER_HEAD = 2048  # maximum slots whose logits exist at a time: with Qwen's vocabulary, about 1.2 GB


@dataclass(frozen=True, slots=True, eq=False)
class Rescored:
    """The model's probabilities for one answer: `logprobs_A` in nats; `coord_probs_N4K` sums to 1, None without bins.

    The distributions are rounded to float16, as in files, so that boxes from memory and from a file are equal.
    """

    logprobs_A: NDArray[np.float64]
    coord_probs_N4K: NDArray[np.float16] | None


@torch.inference_mode()
def rescore(
    checkpoint: Checkpoint,
    collator: Collator,
    samples: Sequence[Sample],
    generations: Sequence[Generation],
    coord_positions: Sequence[NDArray[np.int64]],
    images_per_forward: int,
) -> list[Rescored]:
    """Log-probabilities of all tokens, and distributions at the coordinates of the parsed objects.

    Args:
        coord_positions: per answer (N, 4), positions of the coordinate tokens; ignored for a checkpoint without
            coordinate tokens.
    """
    model = checkpoint.model
    was_training = model.training
    model.eval()
    out: list[Rescored] = []
    for first in range(0, len(samples), images_per_forward):
        chunk = slice(first, first + images_per_forward)
        segments = [_all_text(s, g) for s, g in zip(samples[chunk], generations[chunk], strict=True)]
        batch = collator(segments).to(model.device)
        # One forward over prompt and answer: causal attention gives each token the context that generation gave it, and
        # segments of a packed row do not attend to one another.
        with inference_plan(model.device).autocast(model):
            hidden = hidden_states(model, batch)
            logprobs = _chosen_logprobs(checkpoint, hidden, batch.text_slots, batch.text_targets)
            answers = _split_by_segment(logprobs, collator, segments)
            slots = _split_by_segment(batch.text_slots.cpu().numpy(), collator, segments)
            for logprobs_A, slots_A, positions_N4 in zip(answers, slots, coord_positions[chunk], strict=True):
                probs = _bin_probs(checkpoint, hidden, slots_A[positions_N4.reshape(-1)])
                out.append(Rescored(logprobs_A, probs))
    model.train(was_training)
    return out


def kept_while_generating(form: ModelFormat, generation: Generation, positions_N4: NDArray[np.int64]) -> Rescored:
    """The same for an answer whose engine kept the probabilities; `positions_N4` are its coordinate tokens."""
    probs, coord = generation.probs, form.coord
    assert probs is not None
    if probs.coord_probs_CK is None or coord is None:
        return Rescored(probs.logprobs_A, None)
    is_coord_A = (generation.ids >= coord.first_id) & (generation.ids < coord.end_id)
    assert is_coord_A.sum() == len(probs.coord_probs_CK)
    # The engine kept a distribution for every coordinate token, those of dropped objects included; the running count
    # of coordinate tokens is the index of a token's distribution.
    return Rescored(probs.logprobs_A, probs.coord_probs_CK[is_coord_A.cumsum()[positions_N4] - 1])


def _chosen_logprobs(checkpoint: Checkpoint, hidden: Tensor, slots_S: Tensor, targets_S: Tensor) -> NDArray[np.float64]:
    """The log-probability of each target at its slot."""
    parts = []
    for slots, targets in zip(slots_S.split(_SLOTS_PER_HEAD), targets_S.split(_SLOTS_PER_HEAD), strict=True):
        logits = slot_logits(checkpoint.model, hidden, slots).float()
        parts.append(logits.gather(-1, targets[:, None]).squeeze(-1) - logits.logsumexp(-1))
    return torch.cat(parts).double().cpu().numpy()


def _bin_probs(checkpoint: Checkpoint, hidden: Tensor, slots: NDArray[np.int64]) -> NDArray[np.float16] | None:
    """(N, 4, K) distributions over the bins at the slots of N boxes: the softmax over the coordinate tokens alone."""
    coord = checkpoint.coord
    if coord is None:
        return None
    index = torch.from_numpy(slots).to(hidden.device)
    probs = [
        slot_logits(checkpoint.model, hidden, part)[:, coord.first_id : coord.end_id].float().softmax(-1).cpu()
        for part in index.split(_SLOTS_PER_HEAD)
    ]
    return torch.cat(probs).reshape(-1, 4, NUM_BINS).half().numpy()


def _all_text(sample: Sample, generation: Generation) -> Segment:
    """A segment in which every generated token is a slot, so that one gather collects all of them."""
    n = len(generation.ids)
    return Segment(
        sample=sample,
        answer_ids=generation.ids,
        answer_roles=np.full(n, Role.STRUCT, np.uint8),
        text_weights=np.ones(n, np.float32),
        box_tokens=np.zeros((0, 4), np.int64),
        box_targets=np.zeros((0, 4), np.float32),
    )


def _split_by_segment(values: NDArray, collator: Collator, segments: Sequence[Segment]) -> list[NDArray]:
    """Undo the packing: the slots are listed row by row, in the order of the packed rows."""
    result: list[NDArray] = [np.empty(0)] * len(segments)
    at = 0
    for row in collator.rows(segments):
        for i in row:
            n = len(segments[i].answer_ids)
            result[i] = values[at : at + n]
            at += n
    return result
