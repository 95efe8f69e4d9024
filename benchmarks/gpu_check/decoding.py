"""Generation by the committed engine at the 2B shape: tokens per second by number format and batch."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from benchmarks.gpu_check.run import Check, moment, peak_bytes, seconds_between
from benchmarks.gpu_check.shapes import HEIGHT, SMALL_SIDE, WIDTH, build, config_of, samples
from PIL import Image

from coordexp.geometry.bins import COORD_TOKENS
from coordexp.models.attention import use_segment_attention
from coordexp.models.detection_config import DetectionConfig
from coordexp.models.loading import Checkpoint, read_format
from coordexp.models.processor import pixel_spec
from coordexp.packing.samples import Sample
from coordexp.rollout.engine import DecodeRequest, greedy
from coordexp.rollout.hf_engine import HfEngine
from coordexp.text.vocabulary import CoordVocabulary, token_id

TOKENIZER = Path("models/tiny-base")  # a large one is not at hand; which ids it knows does not matter here
PICTURE = "noise.png"
TOKENS = 64


def speed(check: Check) -> None:
    """One batch of answers of a random model, which says the same thing for ever."""
    for name, dtype in (("bf16", torch.bfloat16), ("float32 weights", torch.float32)):
        with check.part(name), TemporaryDirectory() as folder:
            checkpoint = _checkpoint(check, dtype)
            width, height = check.pick((WIDTH, HEIGHT), (SMALL_SIDE, SMALL_SIDE))
            noise = np.random.default_rng(7).integers(0, 256, (height, width, 3), np.uint8)
            Image.fromarray(noise).save(Path(folder) / PICTURE)
            image_token, factor = checkpoint.model.config.image_token_id, checkpoint.pixels.factor
            (plain,) = checkpoint.tokenizer.encode("1", add_special_tokens=False)
            for batch in (16, 64):
                count = check.pick(batch, batch // 16)
                chosen = samples(image_token, count, width, height, factor)
                asked = [_asked(sample, image_token, plain) for sample in chosen]
                _measure(check, f"{name}, batch {batch}", checkpoint, Path(folder), asked)


def _measure(check: Check, name: str, checkpoint: Checkpoint, images: Path, asked: list[Sample]) -> None:
    engine = HfEngine(checkpoint, images, len(asked))
    request = DecodeRequest(params=greedy(check.pick(TOKENS, 4), "median", "quality"), codec="json", seed=1)
    engine.generate(asked[:2], request)
    first = moment(check.device)
    answers = engine.generate(asked, request)
    seconds = seconds_between(first, moment(check.device))
    tokens = sum(len(answer.ids) for answer in answers)
    note = f"{len(asked) / seconds:.1f} images/s, prompts included; {peak_bytes(check.device) / 1e9:.1f} GB"
    check.add(name, tokens / seconds, "tokens/s", note)


def _asked(sample: Sample, image_token: int, plain: int) -> Sample:
    prompt = np.where(sample.prompt_ids == image_token, image_token, plain).astype(np.int32)
    return replace(sample, image=PICTURE, prompt_ids=prompt)


def _checkpoint(check: Check, dtype: torch.dtype) -> Checkpoint:
    """The shape of 2B with the embedded tokenizer; most ids of its vocabulary have no text."""
    tokenizer = read_format(TOKENIZER).tokenizer
    tokenizer.add_tokens(list(COORD_TOKENS), special_tokens=True)
    config = config_of("2b", check.small)
    for key, token in (("image_token_id", "<|image_pad|>"), ("vision_start_token_id", "<|vision_start|>")):
        setattr(config, key, token_id(tokenizer, token))
    model = use_segment_attention(build(config, check.device, dtype)).eval()
    side = check.pick(WIDTH * HEIGHT, SMALL_SIDE**2)
    coordinates = CoordVocabulary.from_tokenizer(tokenizer)
    detection = DetectionConfig(version=1, codec="json", object_order="top_left", coordinates=coordinates)
    return Checkpoint(model=model, tokenizer=tokenizer, pixels=pixel_spec(config, side, side), detection=detection)
