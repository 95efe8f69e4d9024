"""A finished run of a profile, for benchmarks that need its model and samples; `make demo` makes the default one."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from benchmarks.harness import Row, unmeasured
from transformers import Qwen3VLForConditionalGeneration

from coordexp.config.loading import load_params, load_profile
from coordexp.config.paths import ProfilePaths
from coordexp.config.profile import Profile
from coordexp.config.schema import Params
from coordexp.models.loading import Checkpoint, load_checkpoint
from coordexp.packing.samples import Sample, SampleStore


@dataclass(frozen=True, slots=True)
class TinyRun:
    """Parameters, profile and folders."""

    params: Params
    profile: Profile
    paths: ProfilePaths

    def checkpoint(self, folder: Path) -> Checkpoint:
        """A model of the run, in float32 on the CPU."""
        return load_checkpoint(folder)

    def plain_checkpoint(self, folder: Path) -> Checkpoint:
        """The same as transformers alone would load it: SDPA with masks, a call for each picture, patches by Conv3d."""
        model = Qwen3VLForConditionalGeneration.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="sdpa", local_files_only=True
        )
        return replace(load_checkpoint(folder), model=model)

    def samples(self, split: str, count: int) -> list[Sample]:
        """The first samples of a split."""
        store = SampleStore(self.paths.norm1000 / f"{split}.parquet")
        return [store[i] for i in range(min(count, len(store)))]


def options(parser: argparse.ArgumentParser) -> None:
    """Which run."""
    parser.add_argument("--profile", default="tiny", help="name in configs/")
    parser.add_argument("--root", type=Path, default=Path(), help="folder of data/ and runs/  [default: here]")


def open_run(arguments: argparse.Namespace) -> TinyRun:
    """The run that the options name."""
    profile = load_profile(Path(f"configs/{arguments.profile}.yaml"))
    return TinyRun(load_params(Path("params.yaml")), profile, ProfilePaths(arguments.profile, arguments.root))


def absent(name: str, arguments: argparse.Namespace, *folders: Path) -> list[Row]:
    """The row that says which outputs of the run are not there; empty if all are."""
    missing = [str(folder) for folder in folders if not folder.exists()]
    why = f"needs {', '.join(missing)}: run dvc repro with profile {arguments.profile}"
    return [unmeasured(name, why)] if missing else []
