"""`coordexp.json` of a checkpoint: the prompts of its training, the format of its answers, and the default readout.

A model without this file and without coordinate tokens is a base model: it is prompted for all objects and answers in
digits.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from coordexp.config.block import Text
from coordexp.config.schema import BoxRule, ScoreName, TextParams
from coordexp.errors import CheckpointError, ConfigError
from coordexp.infra.foreign import first_fault
from coordexp.infra.provenance import write_json
from coordexp.models.folder import CHECKPOINT
from coordexp.records.mixing import MAX_CLOSED_NAMES
from coordexp.records.schema import Record
from coordexp.text.vocabulary import CoordVocabulary

FILE = "coordexp.json"
PromptKind = Literal["open", "closed", "listed", "phrase"]


class DetectionConfig(TextParams):
    """How to use a checkpoint, in addition to its tokenizer and processor files."""

    version: Literal[1]
    prompts: tuple[PromptKind, ...] = ("open",)  # kinds of prompts in training (text/prompts.py)
    names: tuple[Text, ...] = ()  # category names in `closed` and `listed` prompts
    box: BoxRule = "median"  # the default readout, as decode.box and decode.score
    score: ScoreName = "quality"
    coordinates: CoordVocabulary | None = None  # None: the tokenizer has no coordinate tokens

    @classmethod
    def of_training(cls, text: TextParams, records: Iterable[Record], coordinates: CoordVocabulary) -> DetectionConfig:
        """The configuration of a model that is trained on these records."""
        kinds, closed, listed = set(), dict[str, None](), set()
        for record in records:
            prompt = record.metadata.get("prompt", {"kind": "open"})
            kinds.add(prompt["kind"])
            if prompt["kind"] == "closed":
                closed |= dict.fromkeys(prompt["names"])
            elif prompt["kind"] == "listed":
                listed |= set(prompt["names"])
        names = (*closed, *sorted(listed - closed.keys()))
        return cls(version=1, **text.model_dump(), prompts=tuple(sorted(kinds)), names=names, coordinates=coordinates)

    @property
    def prompt(self) -> dict[str, Any] | None:
        """The default `metadata.prompt`: all objects if trained with it, otherwise the trained category names."""
        kinds = [kind for kind in ("closed", "listed") if kind in self.prompts]
        if "open" in self.prompts or not kinds or len(self.names) > MAX_CLOSED_NAMES:
            return None
        return {"kind": kinds[0], "names": list(self.names)}

    def prompt_for(self, find: Sequence[str] = (), phrase: str = "") -> dict[str, Any] | None:
        """The `metadata.prompt` to look for these labels or for a phrase, or the default prompt if both are empty.

        A checkpoint that was not trained with label lists gets its default prompt; the caller then filters by label.

        Raises:
            ConfigError: both are given, or a phrase for a checkpoint that was not trained with phrases.
        """
        if find and phrase:
            raise ConfigError("find and phrase are both given; expected at most one of them.")
        if phrase and "phrase" not in self.prompts:
            raise ConfigError(
                f"phrase is {phrase!r}, but this checkpoint was trained with the prompts {', '.join(self.prompts)}. "
                "Use find with labels, or train with `prompt: phrase` (docs/data.md)."
            )
        if phrase:
            return {"kind": "phrase", "names": [phrase]}
        if not find:
            return self.prompt
        kinds = [kind for kind in ("listed", "closed") if kind in self.prompts]
        return {"kind": kinds[0], "names": list(find)} if kinds else None


# A pretrained model follows instructions in natural language, so it also accepts labels and phrases.
BASE = DetectionConfig(version=1, prompts=("listed", "open", "phrase"), codec="digits", object_order="top_left")


def write_detection_config(folder: Path, config: DetectionConfig) -> None:
    """Write the file into a checkpoint folder; a base model needs none."""
    if config.coordinates is not None:
        write_json(folder / FILE, {"version": config.version} | config.model_dump(mode="json"))


def read_detection_config(folder: Path, coordinates: CoordVocabulary | None) -> DetectionConfig:
    """Read the configuration of a checkpoint folder; `coordinates` are those of its tokenizer.

    Raises:
        CheckpointError: the file is damaged, has another version, or belongs to another tokenizer; or it is missing
            although the tokenizer has coordinate tokens, so that the codec is unknown.
    """
    path = folder / FILE
    if not path.exists():
        if coordinates is None:
            return BASE
        raise CheckpointError(
            f"{path}: missing, although the tokenizer has coordinate tokens: the codec of this model's answers is "
            "unknown. Run the stage that writes the checkpoint again, or write the file as docs/api.md shows."
        )
    CHECKPOINT.read_object(path)  # strict JSON first: pydantic's parser accepts duplicate keys
    try:
        config = DetectionConfig.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise CheckpointError(
            f"{path}: {first_fault(error.errors())}. Copy the file again from the source of the weights; if a newer "
            "version of coordexp wrote it, use that version."
        ) from error
    if config.coordinates != coordinates:
        raise CheckpointError(
            f"{path}: coordinates are {config.coordinates}, but those of the tokenizer are {coordinates}. Take this "
            "file, tokenizer and weights from the same checkpoint."
        )
    if coordinates is None and config.codec != "digits":
        raise CheckpointError(
            f"{path}: codec is {config.codec!r}, which needs coordinate tokens, but the tokenizer has none. Take this "
            "file, tokenizer and weights from the same checkpoint."
        )
    return config
