"""`coordexp.json` of a checkpoint: what it was taught to be asked, how its answers are written, and how they are read.

A model without this file and without coordinate tokens is a base model: asked for everything, it answers in digits.
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
    """What decides how a checkpoint is used, beside its tokenizer and its processor files."""

    version: Literal[1]
    prompts: tuple[PromptKind, ...] = ("open",)  # what training records asked for (text/prompts.py)
    names: tuple[Text, ...] = ()  # those that `closed` and `listed` prompts gave
    box: BoxRule = "median"  # the readout of who states none, as decode.box and decode.score
    score: ScoreName = "quality"
    coordinates: CoordVocabulary | None = None  # None: the tokenizer has no coordinate tokens

    @classmethod
    def of_training(cls, text: TextParams, records: Iterable[Record], coordinates: CoordVocabulary) -> DetectionConfig:
        """Of a model that is trained on these records."""
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
        """The `metadata.prompt` of who asks nothing in particular: everything, or else the names that it knows."""
        kinds = [kind for kind in ("closed", "listed") if kind in self.prompts]
        if "open" in self.prompts or not kinds or len(self.names) > MAX_CLOSED_NAMES:
            return None
        return {"kind": kinds[0], "names": list(self.names)}

    def prompt_for(self, find: Sequence[str] = (), phrase: str = "") -> dict[str, Any] | None:
        """The `metadata.prompt` of who asks for these labels, for what a phrase means, or for nothing in particular.

        A checkpoint that never met lists of labels is asked for everything: who asks keeps what was looked for.

        Raises:
            ConfigError: both are asked for, or a phrase of a checkpoint that no phrase was asked of.
        """
        if find and phrase:
            raise ConfigError("find and phrase are two questions; ask one of them.")
        if phrase and "phrase" not in self.prompts:
            raise ConfigError(
                f"phrase is {phrase!r}, but this checkpoint was trained on prompts {', '.join(self.prompts)}. Ask for "
                "labels with find, or train with `prompt: phrase` (docs/data.md)."
            )
        if phrase:
            return {"kind": "phrase", "names": [phrase]}
        if not find:
            return self.prompt
        kinds = [kind for kind in ("listed", "closed") if kind in self.prompts]
        return {"kind": kinds[0], "names": list(find)} if kinds else None


# A pretrained model follows questions in words: it is asked for labels and phrases, too.
BASE = DetectionConfig(version=1, prompts=("listed", "open", "phrase"), codec="digits", object_order="top_left")


def write_detection_config(folder: Path, config: DetectionConfig) -> None:
    """Write it into a checkpoint folder; a base model goes without."""
    if config.coordinates is not None:
        write_json(folder / FILE, {"version": config.version} | config.model_dump(mode="json"))


def read_detection_config(folder: Path, coordinates: CoordVocabulary | None) -> DetectionConfig:
    """What the folder says of itself; `coordinates` are those of its tokenizer.

    Raises:
        CheckpointError: the file is damaged, of another version, or about another tokenizer; or it is missing beside a
            tokenizer with coordinate tokens, whose codec nobody could know.
    """
    path = folder / FILE
    if not path.exists():
        if coordinates is None:
            return BASE
        raise CheckpointError(
            f"{path}: missing beside a tokenizer with coordinate tokens, so it is not known in which codec this model "
            "answers. Run the stage that writes the checkpoint again, or write the file as docs/api.md shows."
        )
    CHECKPOINT.read_object(path)  # JSON that means one thing; pydantic alone takes two equal keys
    try:
        config = DetectionConfig.model_validate_json(path.read_bytes())
    except ValidationError as error:
        raise CheckpointError(
            f"{path}: {first_fault(error.errors())}. Copy the file again from where the weights come from; if that "
            "is a newer version of coordexp, use that one."
        ) from error
    if config.coordinates != coordinates:
        raise CheckpointError(
            f"{path}: coordinates are {config.coordinates}, but those of the tokenizer are {coordinates}. Take file, "
            "tokenizer and weights from one checkpoint."
        )
    if coordinates is None and config.codec != "digits":
        raise CheckpointError(
            f"{path}: codec is {config.codec!r}, which needs coordinate tokens, and the tokenizer has none. Take file, "
            "tokenizer and weights from one checkpoint."
        )
    return config
