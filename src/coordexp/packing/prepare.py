"""Turn records into tokenized samples: boxes to bins, objects to answer tokens, image sizes to visual tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from coordexp.geometry.bins import encode_boxes
from coordexp.geometry.boxes import as_boxes
from coordexp.infra.files import replacing
from coordexp.packing.pixels import PixelSpec, resized_size
from coordexp.packing.samples import Sample, SampleWriter, text_objects
from coordexp.records.schema import ObjectRecord, Record
from coordexp.text.codecs import AnswerCodec, AnswerEncoder, EncodedAnswer, Role, Segment
from coordexp.text.prompts import FORMAT_SUFFIXES, asked_names, prompt_ids, question, question_ids


@dataclass(frozen=True, slots=True)
class PreparedCounts:
    """Counts of one prepared split."""

    samples: int
    objects: int
    tokens: int
    longest: int
    collapsed_boxes: int  # boxes with equal bins on an axis: coordinate tokens cannot express them


class SamplePreparer:
    """Turns records into samples with one tokenizer, pixel format and codec; `formats` are tasks with other codecs."""

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        codec: AnswerCodec,
        pixels: PixelSpec,
        formats: Mapping[str, AnswerCodec] = MappingProxyType({}),
    ) -> None:
        self._tokenizer = tokenizer
        self._encoder = AnswerEncoder(tokenizer, codec)
        self._encoder_of = {task: AnswerEncoder(tokenizer, other) for task, other in formats.items()}
        self._pixels = pixels
        self._prompts: dict[str, NDArray[np.int32]] = {}
        # A few prompts are frequent; prompts that list category names may all differ.
        self._question_ids = lru_cache(maxsize=4096)(lambda words: question_ids(tokenizer, words))

    def prepare(self, record: Record, task: str = "detect") -> Sample:
        """Turn one record into a sample. Crowd objects stay annotations, but are not in the answer.

        If the prompt lists category names (`metadata.prompt`), only these objects are kept as annotations.
        """
        width, height = resized_size(record.width, record.height, self._pixels)
        prompt = record.metadata.get("prompt") if task in FORMAT_SUFFIXES else None
        asked = asked_names(prompt)
        objects = [o for o in record.objects if asked is None or o.desc in asked]
        kept = [o for o in objects if not o.metadata.get("iscrowd")]
        answer = self._answer(record, kept, task)
        ordered = kept + [o for o in objects if o.metadata.get("iscrowd")]
        areas_px2 = tuple(o.area_px2 for o in ordered)
        return Sample(
            image_id=image_id_of(record),
            image=record.image,
            width=record.width,
            height=record.height,
            resized_width=width,
            resized_height=height,
            n_image_tokens=self._pixels.tokens(width, height),
            prompt_ids=self._prompt_ids(task, prompt),
            answer_ids=answer.ids,
            answer_roles=answer.roles,
            answer_objects=answer.object_index,
            descs=tuple(o.desc for o in ordered),
            boxes_xyxy_px=as_boxes([o.bbox_xyxy_px for o in ordered]).astype(np.float32),
            iscrowd=tuple(bool(o.metadata.get("iscrowd")) for o in ordered),
            areas_px2=() if all(area is None for area in areas_px2) else areas_px2,
            probe=(probe := record.metadata.get("probe", "")),
            asked=tuple(prompt["names"]) if probe and prompt else (),
        )

    def _prompt_ids(self, task: str, prompt: dict[str, Any] | None) -> NDArray[np.int32]:
        if prompt is not None:
            return self._question_ids(question(prompt) + FORMAT_SUFFIXES[task])
        if task not in self._prompts:
            self._prompts[task] = prompt_ids(self._tokenizer, task)
        return self._prompts[task]

    def _answer(self, record: Record, objects: Sequence[ObjectRecord], task: str) -> EncodedAnswer:
        if task == "name":
            return self._encoder.encode_segments([Segment(Role.DESC, ", ".join(o.desc for o in objects))])
        if task == "count":
            return self._encoder.encode_segments([Segment(Role.DESC, str(len(objects)))])
        bins = encode_boxes(as_boxes([o.bbox_xyxy_px for o in objects]), record.width, record.height)
        encoder = self._encoder_of.get(task, self._encoder)
        return encoder.encode(text_objects([o.desc for o in objects], bins))


def image_id_of(record: Record) -> int:
    """The image id of the source, or a stable 48-bit hash of the path if the source has none."""
    if "image_id" in record.metadata:
        return int(record.metadata["image_id"])
    return int.from_bytes(hashlib.sha256(record.image.encode()).digest()[:6], "big")


def have_areas(records: Iterable[Record]) -> bool:
    """Whether any object has an annotated area (of a mask), which differs from the area of its box."""
    return any(obj.area_px2 is not None for record in records for obj in record.objects)


def write_split(
    preparer: SamplePreparer, records: Iterable[Record], tasks: Iterable[str], path: Path, with_areas: bool = False
) -> PreparedCounts:
    """Prepare all records and write the parquet file of one split; `with_areas` is the result of `have_areas`."""
    samples = objects = tokens = longest = collapsed = 0
    with replacing(path) as temporary, SampleWriter(temporary, with_areas=with_areas) as writer:
        for record, task in zip(records, tasks, strict=False):
            sample = preparer.prepare(record, task)
            writer.add(sample)
            bins = encode_boxes(sample.boxes_xyxy_px, sample.width, sample.height)
            collapsed += int(((bins[:, 0] >= bins[:, 2]) | (bins[:, 1] >= bins[:, 3])).sum())
            samples, objects = samples + 1, objects + len(bins)
            tokens, longest = tokens + sample.length, max(longest, sample.length)
    return PreparedCounts(samples, objects, tokens, longest, collapsed)
