"""How fast each codec writes the same objects: `generate` held to the annotated answers, three codecs side by side.

    PYTHONPATH=src python -m benchmarks.codec_decoding --profile tiny --checkpoint runs/tiny/stage1

The answers are given, so the codecs differ in nothing but the tokens they need; what is timed is the decoding loop.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from coordexp.config.loading import load_profile
from coordexp.config.paths import ProfilePaths
from coordexp.models.loading import Checkpoint, load_checkpoint
from coordexp.packing.samples import Sample, SampleStore
from coordexp.rollout.hf_engine import HfEngine
from coordexp.text.codecs import CODECS, AnswerEncoder
from coordexp.training.sample_source import permuted

ROUNDS = 3  # the codecs take turns, so that a slow minute of the machine is shared


class Dictation(LogitsProcessor):
    """Leaves one token at each step: the next one of the row's answer, then padding."""

    def __init__(self, answers: Sequence[np.ndarray], prompt_length: int, pad_id: int) -> None:
        self._prompt_length = prompt_length
        self._ids = np.full((len(answers), max(map(len, answers)) + 1), pad_id)
        for row, answer in enumerate(answers):
            self._ids[row, : len(answer)] = answer

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores (B, V) with all but the dictated tokens at -inf."""
        wanted = torch.from_numpy(self._ids[:, input_ids.shape[1] - self._prompt_length])[:, None].to(scores.device)
        return torch.full_like(scores, -torch.inf).scatter(1, wanted, 0.0)


@torch.inference_mode()
def dictate(checkpoint: Checkpoint, engine: HfEngine, samples: Sequence[Sample]) -> float:
    """Seconds of one `generate` that writes the samples' own answers; checks that it did."""
    inputs = engine._inputs(samples)
    width, pad_id = inputs["input_ids"].shape[1], int(checkpoint.tokenizer.pad_token_id)
    answers = [sample.answer_ids for sample in samples]
    processors = LogitsProcessorList([Dictation(answers, width, pad_id)])
    longest = max(map(len, answers))
    started = time.perf_counter()
    options = {"max_new_tokens": longest, "do_sample": False, "logits_processor": processors, "pad_token_id": pad_id}
    output = checkpoint.model.generate(**inputs, **options, eos_token_id=int(answers[0][-1]))
    seconds = time.perf_counter() - started
    written = output[:, width:].cpu().numpy()
    assert all((row[: len(answer)] == answer).all() for row, answer in zip(written, answers, strict=True))
    return seconds


def main() -> None:
    """Print tokens, tokens per second and images per second of each codec at each batch size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--profile", default="tiny")
    parser.add_argument("--checkpoint", type=Path, required=True, help="a checkpoint with coordinate tokens")
    parser.add_argument("--images", type=int, default=64)
    arguments = parser.parse_args()
    paths, model = ProfilePaths(arguments.profile), load_profile(Path(f"configs/{arguments.profile}.yaml")).model
    checkpoint = load_checkpoint(arguments.checkpoint, model.min_pixels, model.max_pixels)
    checkpoint.model.eval()
    engine = HfEngine(checkpoint, paths.raw, arguments.images)
    store = SampleStore(paths.norm1000 / "val.parquet")
    stored = [store[i] for i in range(arguments.images)]
    by_codec = {name: AnswerEncoder(checkpoint.tokenizer, codec) for name, codec in CODECS.items()}
    samples = {name: [permuted(s, encoder, [0]) for s in stored] for name, encoder in by_codec.items()}
    rows = []
    for batch in (1, arguments.images):
        seconds = dict.fromkeys(samples, 0.0)
        count = min(arguments.images, 16) if batch == 1 else arguments.images
        for _ in range(ROUNDS):
            for name, these in samples.items():
                chunks = [these[i : i + batch] for i in range(0, count, batch)]
                seconds[name] += sum(dictate(checkpoint, engine, chunk) for chunk in chunks)
        for name, these in samples.items():
            tokens = ROUNDS * sum(len(s.answer_ids) for s in these[:count])
            n_objects = ROUNDS * sum(len(s.descs) - sum(s.iscrowd) for s in these[:count])
            images_per_second = ROUNDS * count / seconds[name]
            beside = seconds["json"] / seconds[name]
            rows.append([batch, name, tokens / n_objects, tokens / seconds[name], images_per_second, beside])
    header = ["batch", "codec", "tokens per object", "tokens per second", "images per second", "images beside json"]
    print(tabulate(rows, header, floatfmt=".2f"))


if __name__ == "__main__":
    main()
