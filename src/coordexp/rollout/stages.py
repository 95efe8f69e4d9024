"""Decoding as runs: rollouts on the training split, and predictions of a checkpoint on val."""

from __future__ import annotations

import hashlib
import logging
import shutil
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from coordexp.config.paths import model_folder
from coordexp.config.run import RunConfig
from coordexp.config.schema import DecodeParams
from coordexp.infra.code_hash import code_hash
from coordexp.infra.provenance import answer_files, fingerprint, resume_folder, write_json
from coordexp.infra.random_streams import generator
from coordexp.matching.summary import MatchCounts, rounded_ratio
from coordexp.models.loading import Checkpoint, ModelFormat, load_format
from coordexp.packing.collator import Collator
from coordexp.packing.samples import Sample, SampleStore
from coordexp.records.categories import read_categories
from coordexp.records.gt_vs_pred import ImageResult, write_results
from coordexp.rollout.decode import AnswerReader, coord_positions, readable
from coordexp.rollout.engine import DecodeRequest, Engine, Generation
from coordexp.rollout.hf_engine import HfEngine
from coordexp.rollout.opening import generate_answers
from coordexp.rollout.records import Rollout, match_rollouts, write_rollouts
from coordexp.rollout.rescore import rescore
from coordexp.text.symbols import TokenTable

log = logging.getLogger(__name__)
MOST_UNUSABLE = 0.1


def decode_request(run: RunConfig, codec: str) -> DecodeRequest:
    """What a run asks of an engine; for the closed grammar with the names of the data set."""
    return DecodeRequest(
        params=readable(run.params.decode, codec), codec=codec, seed=run.params.seed, names=allowed_names(run)
    )


def allowed_names(run: RunConfig) -> tuple[str, ...]:
    """For the closed grammar all names of the data set, also those that no training image shows; else none."""
    if run.params.decode.grammar != "closed":
        return ()
    return tuple(category.name for category in read_categories(run.paths.records / "categories.json"))


def make_reader(checkpoint: ModelFormat, decode: DecodeParams, identity: dict[str, str] | None = None) -> AnswerReader:
    """A reader of this checkpoint's answers."""
    table = TokenTable.from_tokenizer(checkpoint.tokenizer, checkpoint.coord)
    return AnswerReader(table, checkpoint.codec, identity or {}, decode)


def decode_identity(folder: Path, sample: Sample, request: DecodeRequest) -> dict[str, str]:
    """Short hashes of weights, prompt and decode request: two files with equal identities are comparable."""
    prompt = hashlib.sha256(sample.prompt_ids.tobytes()).hexdigest()[:16]
    decode = hashlib.sha256(repr(request).encode()).hexdigest()[:16]
    return {"model": fingerprint({}, answer_files(folder)), "prompt": prompt, "decode": decode}


def predict_samples(
    checkpoint: Checkpoint,
    reader: AnswerReader,
    samples: Sequence[Sample],
    image_root: Path,
    request: DecodeRequest,
    batch_images: int,
    engine: Engine | None = None,
) -> list[ImageResult]:
    """Generate, re-score and parse; results in the order of the samples. Without an engine the checkpoint generates."""
    engine = engine or HfEngine(checkpoint, image_root, batch_images)
    generations = engine.generate(samples, request)
    return judge_answers(checkpoint, reader, samples, generations, image_root, batch_images)


def judge_answers(
    checkpoint: Checkpoint,
    reader: AnswerReader,
    samples: Sequence[Sample],
    generations: Sequence[Generation],
    image_root: Path,
    batch_images: int,
) -> list[ImageResult]:
    """Re-score and parse answers, whichever engine gave them; results in the order of the samples."""
    pad_id = checkpoint.tokenizer.pad_token_id
    collator = Collator(image_root, checkpoint.pixels, checkpoint.model.config.image_token_id, pad_id, 512)
    positions = [coord_positions(reader.parse(g)) for g in generations]
    rescored = rescore(checkpoint, collator, samples, generations, positions, batch_images)
    texts = checkpoint.tokenizer.batch_decode([g.ids.tolist() for g in generations], skip_special_tokens=False)
    rows = zip(samples, generations, rescored, texts, strict=True)
    return [reader.result(*row) for row in rows]


def run_rollouts(run: RunConfig) -> dict[str, Any]:
    """Stage-1 answers on training images: hand-over file, rollouts with matches, and a summary."""
    folder, out = run.paths.run("stage1"), run.paths.run("rollout")
    out.mkdir(parents=True, exist_ok=True)
    form = load_format(folder)
    store = SampleStore(run.paths.norm1000 / "train.parquet")
    count = min(run.profile.rollout.images, len(store))
    chosen = np.sort(generator(run.params.seed, "rollout/images").permutation(len(store))[:count])
    samples = [store[int(i)] for i in chosen]
    request = decode_request(run, form.codec)
    reader = make_reader(form, request.params, decode_identity(folder, samples[0], request))
    started, batch_images = time.monotonic(), run.profile.rollout.batch_images
    generations, checkpoint, _ = generate_answers(
        run.profile, form, folder, run.paths.raw, batch_images, samples, request
    )
    results = judge_answers(checkpoint, reader, samples, generations, run.paths.raw, batch_images)
    rollouts = match_rollouts(samples, generations, [reader.parse(g) for g in generations], run.params.matching)
    write_results(out / "gt_vs_pred.jsonl", results)
    write_rollouts(out / "rollouts.jsonl", rollouts)
    summary = rollout_summary(samples, rollouts, results) | {"seconds": round(time.monotonic() - started, 1)}
    write_json(out / "summary.json", summary)
    warn_of_unusable(summary)
    return summary


def warn_of_unusable(summary: Mapping[str, Any]) -> None:
    """Say loudly that channel B will find little to train on."""
    if summary["unusable"] > MOST_UNUSABLE * summary["images"]:
        log.warning(
            "%d of %d rollouts do not parse: channel B falls back to ground truth for them. Expected nearly none: "
            "train stage 1 longer, or set decode.grammar.",
            summary["unusable"],
            summary["images"],
        )
    if summary["truncated"] > MOST_UNUSABLE * summary["images"]:
        log.warning(
            "%d of %d rollouts are cut at the token budget. Expected nearly none: train stage 1 longer, or raise "
            "decode.max_new_tokens.",
            summary["truncated"],
            summary["images"],
        )
    if summary["n_pred"] == 0:
        log.warning("the rollouts hold no object at all: matching finds nothing, and channel B only appends misses.")


def rollout_summary(
    samples: Sequence[Sample], rollouts: Sequence[Rollout], results: Sequence[ImageResult]
) -> dict[str, Any]:
    """Counts and the training-time matching F1 of a set of rollouts; ratios are sums over sums, None over nothing."""
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
        "precision": rounded_ratio(counts.precision),
        "recall": rounded_ratio(counts.recall),
        "f1": rounded_ratio(counts.f1),
        "matched_iou_mean": rounded_ratio(counts.matched_iou_mean),
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


def decode_val(run: RunConfig, name: str, folder: Path) -> bool:
    """Predictions of one checkpoint on val; True if they were decoded now, False if taken from the decode cache."""
    cache = _cache_folder(run, folder, "val")
    hit = (cache / "decode.json").is_file()
    decode_split(run, folder, "val")
    out = run.paths.evaluation(name)
    out.mkdir(parents=True, exist_ok=True)
    for file in ("gt_vs_pred.jsonl", "decode.json"):
        shutil.copyfile(cache / file, out / file)
    return not hit


def decode_split(run: RunConfig, folder: Path, split: str) -> Path:
    """The folder of the decode cache with the predictions of one checkpoint on a split; decodes if they are not there.

    The cache is keyed by the weights, the samples and the settings, so that an A/B run decodes only what it changed.
    """
    cache = _cache_folder(run, folder, split)
    if not (cache / "decode.json").is_file():
        temporary = cache.with_name(cache.name + ".tmp")
        temporary.mkdir(parents=True, exist_ok=True)
        _decode_into(temporary, run, folder, SampleStore(run.paths.norm1000 / f"{split}.parquet"))
        temporary.replace(cache)
    return cache


def _cache_folder(run: RunConfig, folder: Path, split: str) -> Path:
    wanted = {
        "decode": run.params.decode.model_dump(),
        "eval": run.profile.eval.model_dump(),
        "engine": run.profile.rollout.engine,
        "names": allowed_names(run),
        "seed": run.params.seed,
        "code": code_hash(__name__),
    }
    inputs = [*answer_files(folder), run.paths.norm1000 / f"{split}.parquet"]
    return resume_folder("decode", fingerprint(wanted, inputs))


def _decode_into(out: Path, run: RunConfig, folder: Path, store: SampleStore) -> None:
    model = run.profile.model
    # The base brings limits of its own, but is asked about pictures of the size that norm1000 gave them.
    is_base = folder == model_folder(model.path)
    form = load_format(folder, model.min_pixels, model.max_pixels) if is_base else load_format(folder)
    codec = form.codec
    request = decode_request(run, codec)
    count = min(run.profile.eval.images or len(store), len(store))
    samples = [store[i] for i in range(count)]
    identity = decode_identity(folder, samples[0], request)
    reader = make_reader(form, request.params, identity)
    batch_images = run.profile.rollout.batch_images
    started = time.monotonic()
    generations, checkpoint, generate_seconds = generate_answers(
        run.profile, form, folder, run.paths.raw, batch_images, samples, request
    )
    results = judge_answers(checkpoint, reader, samples, generations, run.paths.raw, batch_images)
    seconds = time.monotonic() - started
    write_results(out / "gt_vs_pred.jsonl", results)
    summary = {
        "checkpoint": folder.name,
        "codec": codec,
        "identity": identity,
        "settings": request.params.model_dump(),
        "images": len(samples),
        "tokens": sum(r.n_generated_tokens for r in results),
        "seconds": round(seconds, 1),
        "generate_seconds": round(generate_seconds, 2),
    }
    write_json(out / "decode.json", summary)
