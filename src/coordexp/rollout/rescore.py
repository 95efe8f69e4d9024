"""Re-scoring: one packed teacher-forced forward gives the log-probability of every generated token.

Whatever engine produced the ids, and whatever penalties shaped its sampling, these are the model's own probabilities at
temperature 1 under the training prompt.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from coordexp.models.forward import hidden_states, slot_logits
from coordexp.models.loading import Checkpoint
from coordexp.packing.collator import Collator, Segment
from coordexp.packing.samples import Sample
from coordexp.rollout.engine import Generation
from coordexp.text.codecs import Role


@torch.inference_mode()
def token_logprobs(
    checkpoint: Checkpoint,
    collator: Collator,
    samples: Sequence[Sample],
    generations: Sequence[Generation],
    images_per_forward: int,
) -> list[NDArray[np.float64]]:
    """Log-probability (nats) of each generated token, per sample an array as long as its generation."""
    model = checkpoint.model
    was_training = model.training
    model.eval()
    out: list[NDArray[np.float64]] = []
    for first in range(0, len(samples), images_per_forward):
        chunk = slice(first, first + images_per_forward)
        segments = [_all_text(s, g) for s, g in zip(samples[chunk], generations[chunk], strict=True)]
        batch = collator(segments).to(model.device)
        logits = slot_logits(model, hidden_states(model, batch), batch.text_slots).float()
        chosen = logits.gather(-1, batch.text_targets[:, None]).squeeze(-1) - logits.logsumexp(-1)
        out += _split_by_segment(chosen.double().cpu().numpy(), collator, segments)
    model.train(was_training)
    return out


def _all_text(sample: Sample, generation: Generation) -> Segment:
    """A segment in which every generated token is a slot, so that one gather reads all of them."""
    n = len(generation.ids)
    return Segment(
        sample=sample,
        answer_ids=generation.ids,
        answer_roles=np.full(n, Role.STRUCT, np.uint8),
        text_weights=np.ones(n, np.float32),
        box_tokens=np.zeros((0, 4), np.int64),
        box_targets=np.zeros((0, 4), np.float32),
    )


def _split_by_segment(
    values: NDArray[np.float64], collator: Collator, segments: Sequence[Segment]
) -> list[NDArray[np.float64]]:
    """Undo the packing: slots are listed row by row, so follow the same rows."""
    result: list[NDArray[np.float64]] = [np.empty(0)] * len(segments)
    at = 0
    for row in collator.rows(segments):
        for i in row:
            n = len(segments[i].answer_ids)
            result[i] = values[at : at + n]
            at += n
    return result
