"""Add the 1000 coordinate tokens to a pretrained model, once (in the norm1000 stage).

Initial values of the new embedding rows, by `model.coord_init`:
    mean     all rows equal the mean of the existing rows
    digits   the mean of the rows of the bin's decimal digits: starts from what the model knows about numbers
    ordinal  the mean of the ten digit rows, plus a smooth function of the bin: neighboring bins start out similar
If the head is not tied to the embedding, its rows are initialized in the same way.

Averages are a safe start. The logit of a mean row is the mean of the existing logits, so by Jensen's inequality a new
token gets at most the average probability of an existing one (Hewitt 2021, "Initializing New Word Embeddings for
Pretrained Language Models"). A random row can get a large logit and distort every distribution.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase, Qwen3VLForConditionalGeneration

from coordexp.errors import CheckpointError, ConfigError
from coordexp.geometry.bins import COORD_TOKENS, NUM_BINS
from coordexp.infra.random_streams import stream_seed
from coordexp.models.forward import input_table
from coordexp.text.vocabulary import CoordVocabulary, has_coord_tokens

VOCAB_MULTIPLE = 128  # table sizes that GPU kernels tile without remainder
ORDINAL_HARMONICS = 24
# Relative to the std of the existing rows; a larger value makes the initial distributions sharp and incorrect
# (benchmarks/NOTES.md).
ORDINAL_SCALE = 0.3


def round_up(n: int, multiple: int = VOCAB_MULTIPLE) -> int:
    """The smallest multiple >= n: the number of rows of embedding and head."""
    return -(-n // multiple) * multiple


def add_coordinate_tokens(
    model: Qwen3VLForConditionalGeneration, tokenizer: PreTrainedTokenizerBase, init: str, seed: int
) -> CoordVocabulary:
    """Add the tokens to tokenizer and model in place; if they exist already, only check them.

    Raises CheckpointError if only some of them exist.
    """
    if not has_coord_tokens(tokenizer):
        tokenizer.add_tokens(list(COORD_TOKENS), special_tokens=True)
        vocabulary = CoordVocabulary.from_tokenizer(tokenizer)
        rows = input_table(model).num_embeddings
        # Pretrained tables can have spare rows beyond the tokenizer's ids (Qwen3-VL: 151,936 rows for 151,669 ids);
        # these are used first.
        if vocabulary.end_id > rows:
            model.resize_token_embeddings(round_up(vocabulary.end_id), mean_resizing=False)
        _fill_rows(model, tokenizer, vocabulary, max(vocabulary.end_id, rows), init, seed)
        return vocabulary
    vocabulary = CoordVocabulary.from_tokenizer(tokenizer)
    rows = input_table(model).num_embeddings
    if vocabulary.end_id > rows:
        raise CheckpointError(
            f"the tokenizer has coordinate ids up to {vocabulary.end_id - 1}, the model only {rows} rows."
        )
    return vocabulary


def _fill_rows(
    model: Qwen3VLForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    vocabulary: CoordVocabulary,
    first_padding: int,
    init: str,
    seed: int,
) -> None:
    """Fill the rows of the coordinate tokens, and the padding rows from `first_padding` on, which have no token."""
    tables = [input_table(model).weight]
    if not model.config.tie_word_embeddings:
        tables.append(model.lm_head.weight)
    digit_ids = [tokenizer.encode(str(d), add_special_tokens=False)[0] for d in range(10)]
    with torch.no_grad():
        for table_VD in tables:
            known = table_VD[: vocabulary.first_id]
            table_VD[vocabulary.first_id : vocabulary.end_id] = coordinate_rows(known, digit_ids, init, seed)
            # Padding rows take part in every softmax, and `resize_token_embeddings` leaves unseeded random values
            # there. As means they get little probability, and runs repeat exactly.
            table_VD[first_padding:] = known.mean(0)


def coordinate_rows(known_VD: Tensor, digit_ids: list[int], init: str, seed: int) -> Tensor:
    """Initial rows (1000, D) from the rows of the existing tokens; the module docstring lists the methods."""
    if init == "mean":
        return known_VD.mean(0).expand(NUM_BINS, -1).clone()
    digits = [[digit_ids[int(d)] for d in str(k)] for k in range(NUM_BINS)]
    rows_KD = torch.stack([known_VD[ids].mean(0) for ids in digits])
    if init == "digits":
        return rows_KD
    if init == "ordinal":
        scale = ORDINAL_SCALE * float(known_VD.std())
        return known_VD[digit_ids].mean(0) + ordinal_term(known_VD.shape[1], scale, seed).to(rows_KD)
    raise ConfigError(f"model.coord_init is {init!r}, expected mean, digits or ordinal.")


def ordinal_term(hidden: int, scale: float, seed: int) -> Tensor:
    """(1000, D) sum of cosines of the bin along random directions, with weight 1/j for harmonic j and std `scale`.

    The inner product of two rows falls smoothly with the distance of their bins. The weights make low frequencies
    dominate, so that most of the variance separates distant bins.
    """
    generator = torch.Generator().manual_seed(stream_seed(seed, "model/coordinate-rows"))
    directions_JD = torch.randn(ORDINAL_HARMONICS, hidden, generator=generator)
    harmonics_J = torch.arange(1, ORDINAL_HARMONICS + 1)
    position_K = (torch.arange(NUM_BINS) + 0.5) / NUM_BINS
    waves_KJ = torch.cos(math.pi * position_K[:, None] * harmonics_J) / harmonics_J
    term_KD = waves_KJ @ directions_JD
    return term_KD * (scale / term_KD.std())
