"""Adding the coordinate tokens: once, with consecutive ids, and with rows derived from existing ones.

Shapes: V vocabulary, D hidden size, K = 1000 bins.
"""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from coordexp.errors import CheckpointError, ConfigError
from coordexp.geometry.bins import COORD_TOKENS, NUM_BINS
from coordexp.models.expand import ORDINAL_SCALE, add_coordinate_tokens, coordinate_rows, ordinal_term
from coordexp.models.loading import load_checkpoint
from coordexp.text.vocabulary import CoordVocabulary
from helpers import new_tokenizer, save_model
from toyworld.model import build_tiny, tiny_config

DIGIT_IDS = list(range(10, 20))


@pytest.fixture
def known_VD():
    return torch.randn(300, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def fresh():
    tokenizer = new_tokenizer()
    return build_tiny(tokenizer, 3), tokenizer


def embedding(model) -> torch.Tensor:
    return model.get_input_embeddings().weight


def test_ids_follow_the_known_tokens_and_rows_are_a_multiple_of_128(fresh):
    model, tokenizer = fresh
    n_known, before = len(tokenizer), embedding(model).detach().clone()
    vocabulary = add_coordinate_tokens(model, tokenizer, "digits", 1)
    assert vocabulary == CoordVocabulary(n_known) == CoordVocabulary.from_tokenizer(tokenizer)
    rows = len(embedding(model))
    assert rows % 128 == 0
    assert 0 <= rows - vocabulary.end_id < 128
    assert model.config.text_config.vocab_size == rows
    torch.testing.assert_close(embedding(model)[:n_known], before[:n_known], rtol=0, atol=0)


def test_rows_do_not_depend_on_earlier_random_numbers():
    """Neither do padding rows without a token, which also take part in the loss."""
    tables = []
    for state in (1, 2):
        tokenizer = new_tokenizer()
        model = build_tiny(tokenizer, 3)
        torch.manual_seed(state)
        add_coordinate_tokens(model, tokenizer, "ordinal", 1)
        tables.append(embedding(model).detach())
    assert torch.equal(*tables)


def test_each_token_is_encoded_as_one_special_token(fresh):
    model, tokenizer = fresh
    vocabulary = add_coordinate_tokens(model, tokenizer, "mean", 1)
    assert tokenizer.encode("".join(COORD_TOKENS), add_special_tokens=False) == list(
        range(vocabulary.first_id, vocabulary.end_id)
    )
    assert tokenizer.decode([vocabulary.first_id + 7], skip_special_tokens=True) == ""


@pytest.mark.parametrize("init", ["mean", "digits", "ordinal"])
def test_adding_twice_changes_nothing(fresh, init):
    model, tokenizer = fresh
    first = add_coordinate_tokens(model, tokenizer, init, 1)
    weights, size = embedding(model).detach().clone(), len(tokenizer)
    assert add_coordinate_tokens(model, tokenizer, "mean" if init == "digits" else "digits", 2) == first
    assert len(tokenizer) == size
    torch.testing.assert_close(embedding(model), weights, rtol=0, atol=0)


def test_a_tied_head_stays_tied_also_on_disk(fresh, tmp_path):
    model, tokenizer = fresh
    vocabulary = add_coordinate_tokens(model, tokenizer, "ordinal", 1)
    assert model.lm_head.weight is embedding(model)
    save_model(tmp_path, model, tokenizer)
    loaded = load_checkpoint(tmp_path)
    assert loaded.coord == vocabulary
    assert loaded.model.lm_head.weight is embedding(loaded.model)
    torch.testing.assert_close(embedding(loaded.model), embedding(model), rtol=0, atol=0)
    assert add_coordinate_tokens(loaded.model, loaded.tokenizer, "ordinal", 1) == vocabulary


def test_an_untied_head_gets_separate_rows():
    tokenizer = new_tokenizer()
    config = tiny_config(tokenizer)
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = False
    model = type(build_tiny(tokenizer, 3))(config)
    n_known = len(tokenizer)
    vocabulary = add_coordinate_tokens(model, tokenizer, "mean", 1)
    for table in (embedding(model), model.get_output_embeddings().weight):
        rows = table[vocabulary.first_id : vocabulary.end_id]
        torch.testing.assert_close(rows, table[:n_known].mean(0).expand(NUM_BINS, -1))
    assert (embedding(model)[n_known] - model.get_output_embeddings().weight[n_known]).abs().max() > 1e-4


def test_spare_rows_of_the_table_are_used():
    tokenizer = new_tokenizer()
    model = build_tiny(tokenizer, 3)
    model.resize_token_embeddings(2048, mean_resizing=False)
    add_coordinate_tokens(model, tokenizer, "mean", 1)
    assert len(embedding(model)) == 2048


def test_a_tokenizer_with_some_of_the_tokens_is_refused(fresh):
    model, tokenizer = fresh
    tokenizer.add_tokens(list(COORD_TOKENS[:10]), special_tokens=True)
    with pytest.raises(CheckpointError, match="990 of 1000 coordinate tokens are missing"):
        add_coordinate_tokens(model, tokenizer, "mean", 1)


def test_a_tokenizer_without_the_first_token_is_refused(fresh):
    model, tokenizer = fresh
    tokenizer.add_tokens(list(COORD_TOKENS[1:]), special_tokens=True)
    with pytest.raises(CheckpointError, match="not consecutive"):
        add_coordinate_tokens(model, tokenizer, "mean", 1)


def test_a_model_with_too_few_rows_for_its_tokenizer_is_refused(fresh):
    model, tokenizer = fresh
    tokenizer.add_tokens(list(COORD_TOKENS), special_tokens=True)
    with pytest.raises(
        CheckpointError, match=f"up to {len(tokenizer) - 1}, the model only {len(embedding(model))} rows"
    ):
        add_coordinate_tokens(model, tokenizer, "mean", 1)


def test_mean_rows(known_VD):
    rows = coordinate_rows(known_VD, DIGIT_IDS, "mean", 0)
    torch.testing.assert_close(rows, known_VD.mean(0).expand(NUM_BINS, -1))


@pytest.mark.parametrize(
    ("bin_index", "digits"), [(0, [0]), (7, [7]), (40, [4, 0]), (100, [1, 0, 0]), (999, [9, 9, 9])]
)
def test_digit_rows_are_the_mean_of_the_digits_of_the_bin(known_VD, bin_index, digits):
    rows = coordinate_rows(known_VD, DIGIT_IDS, "digits", 0)
    torch.testing.assert_close(rows[bin_index], sum(known_VD[10 + d] for d in digits) / len(digits))


def test_ordinal_rows_add_a_smooth_term_to_the_mean_digit(known_VD):
    rows_KD = coordinate_rows(known_VD, DIGIT_IDS, "ordinal", 5)
    term_KD = ordinal_term(64, ORDINAL_SCALE * float(known_VD.std()), 5)
    torch.testing.assert_close(rows_KD, known_VD[DIGIT_IDS].mean(0) + term_KD)


def test_the_ordinal_term_makes_neighbors_similar():
    term_KD = ordinal_term(64, 0.3, 5)
    similarity = F.normalize(term_KD, dim=-1) @ F.normalize(term_KD, dim=-1).T
    by_distance = [float(similarity.diagonal(gap).mean()) for gap in (1, 20, 80, 300)]
    assert by_distance[0] > 0.99
    assert by_distance == sorted(by_distance, reverse=True)
    assert float(term_KD.std()) == pytest.approx(0.3, rel=1e-4)
    assert len(torch.unique(term_KD, dim=0)) == NUM_BINS
    assert not torch.equal(term_KD, ordinal_term(64, 0.3, 6))


def test_an_unknown_initialization_is_refused(known_VD):
    with pytest.raises(ConfigError, match=r"model\.coord_init is 'random', expected mean, digits or ordinal"):
        coordinate_rows(known_VD, DIGIT_IDS, "random", 0)
