"""How long `coordexp evaluate` takes on a set as large as COCO's val, and how much memory.

    PYTHONPATH=src python -m benchmarks.evaluation_speed --images 5000 --predictions 100 --out /tmp/speed

Writes a synthetic gt_vs_pred.jsonl (80 names, 0 to 14 objects an image, predictions scattered around them and invented
elsewhere), runs the command in a process of its own, and prints seconds and peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

N_NAMES = 80
WIDTH, HEIGHT = 640, 480


def write_synthetic_results(path: Path, n_images: int, n_predictions: int, seed: int = 17) -> None:
    """Write n_images lines with n_predictions scored boxes each; about a third of the boxes lie on an object."""
    rng = np.random.default_rng(seed)
    with path.open("w", encoding="utf-8") as out:
        for image_id in range(1, n_images + 1):
            out.write(json.dumps(_image(rng, image_id, n_predictions)) + "\n")


def _image(rng: np.random.Generator, image_id: int, n_predictions: int) -> dict:
    gt_boxes = _boxes(rng, int(rng.integers(0, 15)))
    names = rng.choice(rng.integers(0, N_NAMES, 4), len(gt_boxes)).tolist()  # few names an image, as in photographs
    boxes, pred_names = _boxes(rng, n_predictions), rng.integers(0, N_NAMES, n_predictions)
    near = rng.random(n_predictions) < (0.35 if len(gt_boxes) else 0.0)
    target = rng.integers(0, max(1, len(gt_boxes)), n_predictions)
    if near.any():
        sides = np.tile(gt_boxes[:, 2:] - gt_boxes[:, :2], 2)
        boxes[near] = _ordered((gt_boxes + rng.normal(0, 0.06, gt_boxes.shape) * sides)[target[near]])
        boxes[near] += rng.normal(0, 1, (near.sum(), 1))
        pred_names[near] = np.where(rng.random(near.sum()) < 0.85, np.array(names)[target[near]], pred_names[near])
    logprob = np.where(near, rng.normal(-0.8, 0.5, n_predictions), rng.normal(-1.4, 0.5, n_predictions))
    return {
        "image_id": image_id,
        "image": f"{image_id:06d}.jpg",
        "width": WIDTH,
        "height": HEIGHT,
        "gt": [{"desc": f"name {n}", "bbox_xyxy_px": b} for n, b in zip(names, gt_boxes.tolist(), strict=True)],
        "pred": [
            {
                "desc": f"name {name}",
                "bbox_xyxy_px": box,
                "bins": [0, 0, 0, 0],
                "coord_logprobs": [round(lp, 4)] * 4,
                "desc_logprob": round(lp / 2, 4),
                "score": round(float(np.exp(min(lp, 0.0))), 6),
            }
            for name, box, lp in zip(pred_names.tolist(), boxes.tolist(), logprob.tolist(), strict=True)
        ],
        "raw_text": "",
        "parse": {"container_found": True, "n_valid": n_predictions},
        "finish_reason": "stop",
        "n_generated_tokens": 20 * n_predictions,
    }


def _boxes(rng: np.random.Generator, n: int) -> np.ndarray:
    side = np.exp(rng.uniform(np.log(12), np.log(240), (n, 2)))
    corner = rng.uniform(0, 1, (n, 2)) * (np.array([WIDTH, HEIGHT]) - side)
    return np.concatenate([corner, corner + side], axis=1).round(3)


def _ordered(boxes: np.ndarray) -> np.ndarray:
    return np.concatenate([np.minimum(boxes[:, :2], boxes[:, 2:]), np.maximum(boxes[:, :2], boxes[:, 2:])], axis=1)


def measure(results: Path, out: Path) -> tuple[float, float]:
    """Run the command; returns wall seconds and its peak resident memory in GiB."""
    start = time.perf_counter()
    command = [sys.executable, "-m", "coordexp.cli", "evaluate", str(results), "--out", str(out)]
    subprocess.run(command, check=True, env=os.environ)
    seconds = time.perf_counter() - start
    return seconds, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20


def main() -> None:
    """Parse the command line, write the file if it is not there, measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--predictions", type=int, default=100, help="per image")
    parser.add_argument("--out", type=Path, required=True, help="folder for the synthetic file and the metrics")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = arguments.out / f"gt_vs_pred_{arguments.images}x{arguments.predictions}.jsonl"
    if not results.exists():
        write_synthetic_results(results, arguments.images, arguments.predictions)
    seconds, peak = measure(results, arguments.out / "metrics.json")
    print(f"{arguments.images} images x {arguments.predictions} predictions: {seconds:.1f} s, peak {peak:.2f} GiB")


if __name__ == "__main__":
    main()
