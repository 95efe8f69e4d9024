"""Decoding as runs: rollouts on the training split, and predictions of a checkpoint on val."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, Sequence

import numpy as np

from coordexp.config.paths import ProfilePaths
from coordexp.config.profile import Profile
from coordexp.config.provenance import file_hash, fingerprint, resume_folder, write_json
from coordexp.config.schema import Params
from coordexp.matching.settings import MatchSettings
from coordexp.matching.summary import MatchCounts
from coordexp.models.loading import Checkpoint, load_checkpoint
from coordexp.packing.collator import Collator
from coordexp.packing.samples import Sample, SampleStore
from coordexp.records.gt_vs_pred import ImageResult, write_results
from coordexp.rollout.decode import AnswerReader
from coordexp.rollout.engine import DecodeSettings, Generation
from coordexp.rollout.hf_engine import HfEngine
from coordexp.rollout.records import Rollout, match_rollout, write_rollouts
from coordexp.rollout.rescore import token_logprobs
from coordexp.text.prompts import prompt_ids
from coordexp.text.symbols import TokenTable


def decode_settings(params: Params) -> DecodeSettings:
    """Sampling settings from parameters."""
    decode = params.decode
    return DecodeSettings(
        max_new_tokens=decode.max_new_tokens,
        temperature=decode.temperature,
        top_p=decode.top_p,
        repetition_penalty=decode.repetition_penalty,
        seed=params.seed,
    )


def match_settings(params: Params) -> MatchSettings:
    """Matching settings from parameters."""
    return MatchSettings(**params.matching.model_dump())


def make_reader(checkpoint: Checkpoint, codec: str, identity: dict[str, str]) -> AnswerReader:
    """A reader of this checkpoint's answers."""
    return AnswerReader(TokenTable.from_tokenizer(checkpoint.tokenizer, checkpoint.coord), codec, identity)


def decode_identity(folder: Path, sample: Sample, settings: DecodeSettings, codec: str) -> dict[str, str]:
    """Short hashes of weights, prompt and decode settings: two files with equal identities are comparable."""
    prompt = hashlib.sha256(sample.prompt_ids.tobytes()).hexdigest()[:16]
    decode = hashlib.sha256(f"{settings}{codec}".encode()).hexdigest()[:16]
    return {"model": file_hash(folder / "model.safetensors"), "prompt": prompt, "decode": decode}


def predict_samples(
    checkpoint: Checkpoint,
    reader: AnswerReader,
    samples: Sequence[Sample],
    image_root: Path,
    settings: DecodeSettings,
    batch_images: int,
) -> tuple[list[Generation], list[ImageResult]]:
    """Generate, re-score and parse; results in the order of the samples."""
    generations = HfEngine(checkpoint, image_root, batch_images).generate(samples, settings)
    pad_id = checkpoint.tokenizer.pad_token_id
    collator = Collator(image_root, checkpoint.pixels, checkpoint.model.config.image_token_id, pad_id, 512)
    logprobs = token_logprobs(checkpoint, collator, samples, generations, batch_images)
    texts = checkpoint.tokenizer.batch_decode([g.ids.tolist() for g in generations], skip_special_tokens=False)
    rows = zip(samples, generations, logprobs, texts, strict=True)
    return generations, [reader.result(s, g, lp, text) for s, g, lp, text in rows]


def run_rollouts(params: Params, profile: Profile, paths: ProfilePaths) -> dict[str, Any]:
    """Stage-1 answers on training images: hand-over file, rollouts with matches, and a summary."""
    folder, out = paths.run("stage1"), paths.run("rollout")
    out.mkdir(parents=True, exist_ok=True)
    checkpoint = load_checkpoint(folder, profile.model.min_pixels, profile.model.max_pixels)
    store = SampleStore(paths.norm1000 / "train.parquet")
    count = min(profile.rollout.images, len(store))
    chosen = np.sort(np.random.default_rng([params.seed, 2]).permutation(len(store))[:count])
    samples = [store[int(i)] for i in chosen]
    settings = decode_settings(params)
    reader = make_reader(
        checkpoint, params.text.codec, decode_identity(folder, samples[0], settings, params.text.codec)
    )
    started = time.monotonic()
    generations, results = predict_samples(
        checkpoint, reader, samples, paths.raw, settings, profile.rollout.batch_images
    )
    matching = match_settings(params)
    rollouts = [match_rollout(s, g, reader.parse(g), matching) for s, g in zip(samples, generations, strict=True)]
    write_results(out / "gt_vs_pred.jsonl", results)
    write_rollouts(out / "rollouts.jsonl", rollouts)
    summary = rollout_summary(samples, rollouts, results) | {"seconds": round(time.monotonic() - started, 1)}
    write_json(out / "summary.json", summary)
    return summary


def rollout_summary(
    samples: Sequence[Sample], rollouts: Sequence[Rollout], results: Sequence[ImageResult]
) -> dict[str, Any]:
    """Counts and the training-time matching F1 of a set of rollouts; ratios are sums over sums."""
    counts = MatchCounts(
        n_pred=sum(len(r.objects) for r in rollouts),
        n_gt=sum(len(s.descs) - sum(s.iscrowd) for s in samples),
        n_matched=sum(len(r.pairs) for r in rollouts),
        iou_sum=float(sum(sum(r.pair_ious) for r in rollouts)),
    )
    dropped: Counter[str] = Counter()
    for result in results:
        dropped.update(result.parse.dropped)
    tokens = [r.n_generated_tokens for r in results]
    return {
        "images": len(rollouts),
        "precision": round(counts.precision, 4),
        "recall": round(counts.recall, 4),
        "f1": round(counts.f1, 4),
        "matched_iou_mean": round(counts.matched_iou_mean, 4),
        "n_pred": counts.n_pred,
        "n_gt": counts.n_gt,
        "n_matched": counts.n_matched,
        "parse_rate": round(sum(r.parse.ok for r in results) / len(results), 4),
        "unusable": sum(not r.usable for r in rollouts),
        "truncated": sum(r.parse.truncated for r in results),
        "dropped": dict(dropped),
        "tokens_mean": round(float(np.mean(tokens)), 1),
        "tokens_p99": int(np.quantile(tokens, 0.99)),
    }


def decode_val(params: Params, profile: Profile, paths: ProfilePaths, name: str, folder: Path) -> bool:
    """Predictions of one checkpoint on val; True if they were decoded now, False if taken from the decode cache.

    The cache is keyed by the weights, the samples and the settings, so that an A/B run decodes only what it changed.
    """
    samples_file, out = paths.norm1000 / "val.parquet", paths.evaluation(name)
    wanted = {"decode": params.decode.model_dump(), "eval": profile.eval.model_dump(), "seed": params.seed}
    key = fingerprint(wanted | {"code": code_hash()}, [folder / "model.safetensors", samples_file])
    cache = resume_folder("decode", key)
    hit = (cache / "decode.json").is_file()
    if not hit:
        temporary = cache.with_name(cache.name + ".tmp")
        temporary.mkdir(parents=True, exist_ok=True)
        _decode_into(temporary, params, profile, paths, folder, SampleStore(samples_file))
        temporary.replace(cache)
    out.mkdir(parents=True, exist_ok=True)
    for file in ("gt_vs_pred.jsonl", "decode.json"):
        shutil.copyfile(cache / file, out / file)
    return not hit


def _decode_into(
    out: Path, params: Params, profile: Profile, paths: ProfilePaths, folder: Path, store: SampleStore
) -> None:
    checkpoint = load_checkpoint(folder, profile.model.min_pixels, profile.model.max_pixels)
    settings, codec = decode_settings(params), checkpoint.codec_name or params.text.codec
    samples = prompted(checkpoint, [store[i] for i in range(profile.eval.images or len(store))])
    identity = decode_identity(folder, samples[0], settings, codec)
    reader = make_reader(checkpoint, codec, identity)
    started = time.monotonic()
    _, results = predict_samples(checkpoint, reader, samples, paths.raw, settings, profile.eval.batch_images)
    seconds = time.monotonic() - started
    write_results(out / "gt_vs_pred.jsonl", results)
    summary = {
        "checkpoint": folder.name,
        "codec": codec,
        "identity": identity,
        "settings": params.decode.model_dump(),
        "images": len(samples),
        "tokens": sum(r.n_generated_tokens for r in results),
        "seconds": round(seconds, 1),
    }
    write_json(out / "decode.json", summary)


def prompted(checkpoint: Checkpoint, samples: Sequence[Sample]) -> list[Sample]:
    """The samples with the prompt as this checkpoint's own tokenizer writes it (it may lack the coordinate tokens)."""
    prompt = prompt_ids(checkpoint.tokenizer)
    return [replace(sample, prompt_ids=prompt) for sample in samples]


def code_hash() -> str:
    """Hash of the sources that decide what a decode contains; an edit there must not reuse older predictions."""
    package = Path(__file__).parents[1]
    files = [
        p
        for part in ("models", "packing", "rollout", "text", "geometry")
        for p in sorted((package / part).glob("*.py"))
    ]
    return hashlib.sha256(b"".join(p.read_bytes() for p in files)).hexdigest()[:16]
