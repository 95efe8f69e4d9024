"""The command line of the check; see the package."""

from __future__ import annotations

import argparse
import gc
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from benchmarks.gpu_check import attention, decoding, graph, head, products, state, step
from benchmarks.gpu_check.predictions import predictions
from benchmarks.gpu_check.results import TABLE, markdown, read
from benchmarks.gpu_check.run import Check, Section

from benchmarks import gpu_check
from coordexp.infra import DEVICE_VARIABLE

NO_GPU = 2
GRAPH_NEEDS = ("pandas", "skimage", "pycocotools", "faster_coco_eval")  # pictures, the end of a stage, evaluation

# In order of value: what is cut off by the deadline is the least.
SECTIONS = (
    Section("ceilings", 10, products.ceilings),
    Section("patch-embedding", 15, products.patch_embedding),
    Section("attention", 25, attention.speed),
    Section("packed-alone", 25, attention.packed_as_alone),
    Section("head-exact", 20, head.exactness),
    Section("head-speed", 40, head.speed),
    Section("graph", 60, graph.smoke, GRAPH_NEEDS),
    Section("step-2b", 90, step.all_weights),
    Section("step-lora", 50, step.adapters, ("peft",)),
    Section("decoding", 25, decoding.speed),
    Section("state", 15, state.saving),
    Section("base", 30, state.pretraining, GRAPH_NEEDS),
    Section("gpu-tests", 40, graph.gpu_tests, ("pytest", "hypothesis")),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run, and return the exit code: 1 if anything is broken, 2 without a GPU."""
    arguments = _parser().parse_args(argv)
    if not (arguments.cpu or torch.cuda.is_available()):
        print("gpu-check: torch sees no GPU here. --cpu shows that the check itself works.", file=sys.stderr)
        return NO_GPU
    device = torch.device("cpu" if arguments.cpu else "cuda")
    if arguments.cpu:
        os.environ[DEVICE_VARIABLE] = "cpu"  # also where there is a GPU
        torch.set_num_threads(1)  # what is this small gains nothing by more
    chosen = [section for section in SECTIONS if not arguments.only or section.name in arguments.only]
    check = Check(device, arguments.out, arguments.deadline, arguments.cpu, predictions())
    others = check.run(chosen)
    if others:
        _begin_again(arguments, others, check.seconds_left)
    results = read(arguments.out)
    text = markdown(results)
    (arguments.out / TABLE).write_text(text, encoding="utf-8")
    print(text)
    is_broken = any(result.is_fault for result in results)
    if arguments.cpu:
        is_broken |= any(result.status == "skipped" for result in check.results)
        is_broken |= not arguments.only and _has_idle_predictions(check)
    return int(is_broken)


def _has_idle_predictions(check: Check) -> bool:
    """Whether some figure is predicted that no section measures, as after a change of its name."""
    measured = {(result.section, result.name) for result in check.results}
    idle = sorted(set(predictions()) - measured)
    print("".join(f"predicted, but not measured: {section}: {name}\n" for section, name in idle), end="")
    return bool(idle)


def _begin_again(arguments: argparse.Namespace, sections: Sequence[Section], seconds_left: float) -> None:
    """Go on in a fresh process with the same results: in this one, the device is lost."""
    names = [section.name for section in sections]
    options = ["--out", str(arguments.out), "--deadline", f"{seconds_left:.0f}", "--only", *names]
    os.execv(sys.executable, [sys.executable, "-m", gpu_check.__name__, *options])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gpu-check", description=gpu_check.__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [section.name for section in SECTIONS]
    parser.add_argument("--out", type=Path, required=True, help="folder of the results; lines are added")
    parser.add_argument("--deadline", type=float, default=460, help="seconds after which nothing new begins [460]")
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"of {', '.join(names)}")
    parser.add_argument("--cpu", action="store_true", help="all of it, shrunken, on the CPU; here none may be left out")
    return parser


if __name__ == "__main__":
    gc.freeze()  # garbage is collected before each measurement: not among the million objects of the libraries
    raise SystemExit(main())
