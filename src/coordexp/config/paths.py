"""Where one profile's files live. Each folder has exactly one writing stage in dvc.yaml."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from coordexp.infra.files import repository_root

CHECKPOINTS = ("base", "stage1", "stage1-control", "stage2")  # the rows of the report, in order
# Key in metrics.json -> the two checkpoints, new first.
COMPARISONS = {
    "stage2_vs_stage1": ("stage2", "stage1"),
    "stage2_vs_control": ("stage2", "stage1-control"),
    "stage1_vs_base": ("stage1", "base"),
}

# In the folder of each trained checkpoint; KEPT_STEPS holds checkpoints of earlier steps, `step_000050` and so on.
RUN_METADATA, TRAIN_LOG, CONTEXT_ROWS = "run_metadata.json", "train_log.jsonl", "context_errors.jsonl"
KEPT_STEPS = "kept"
# In the folder of each evaluated checkpoint: its judged answers, and how they were made.
GT_VS_PRED, DECODE_SUMMARY = "gt_vs_pred.jsonl", "decode.json"


def model_folder(path: str) -> Path:
    """Where `model.path` leads. A relative one starts here, or else at the repository: a copy of it lacks links."""
    here = Path(path).expanduser()
    return here if here.exists() else repository_root() / here


@dataclass(frozen=True, slots=True)
class ProfilePaths:
    """The folders of one profile under `root` (the repository, unless told otherwise)."""

    profile: str
    root: Path = Path()

    @property
    def inputs(self) -> Path:
        """What each stage is told, one file a stage."""
        return self.root / "inputs" / self.profile

    @property
    def raw(self) -> Path:
        """The manifest of the data sets, and the images that were composed."""
        return self.root / "data" / self.profile / "raw"

    @property
    def records(self) -> Path:
        """Records of the splits, categories, dropped annotations."""
        return self.root / "data" / self.profile / "records"

    @property
    def norm1000(self) -> Path:
        """Tokenised samples, and the initial checkpoint with coordinate tokens in `init/`."""
        return self.root / "data" / self.profile / "norm1000"

    @property
    def init(self) -> Path:
        """The checkpoint with coordinate tokens that stage 1 starts from."""
        return self.norm1000 / "init"

    @property
    def packed(self) -> Path:
        """Pack plan and its statistics."""
        return self.root / "data" / self.profile / "packed"

    def run(self, stage: str) -> Path:
        """Output of a training stage or of `rollout`."""
        return self.root / "runs" / self.profile / stage

    def decoded(self, checkpoint: str) -> Path:
        """Answers of one of `CHECKPOINTS` on val, with the distributions that boxes and scores are read from."""
        return self.run("decode") / checkpoint

    def evaluation(self, checkpoint: str) -> Path:
        """Predictions of one of `CHECKPOINTS` on val, judged."""
        return self.run("eval") / checkpoint

    @property
    def metrics(self) -> Path:
        """All metrics of all checkpoints."""
        return self.run("eval") / "metrics.json"

    @property
    def rollout_summary(self) -> Path:
        """What stage 2 found in the rollouts on file: counts, matches, the training-time F1."""
        return self.run("stage2-rollouts.json")

    @property
    def rollouts(self) -> Path:
        """Stage-1 answers on training images."""
        return self.run("rollout") / "rollouts.jsonl"

    def run_record(self, stage: str) -> Path:
        """Clock, machine and commit of the last run of a stage, beside the outputs: equal runs give equal bytes.

        No output of the graph: ignored by git and not known to DVC, absent where the stage was restored.
        """
        return self.root / "runs" / self.profile / f"{stage}.run.json"

    @property
    def reports(self) -> Path:
        """Metrics, report, figures and gallery."""
        return self.root / "reports" / self.profile

    def curve(self, name: str) -> Path:
        """The table that `dvc plots` draws for one stage."""
        return self.reports / "curves" / f"{name}.tsv"
