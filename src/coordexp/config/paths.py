"""The paths of one profile's files. Exactly one stage of dvc.yaml writes each folder."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from coordexp.infra.files import repository_root

CHECKPOINTS = ("base", "stage1", "stage1-control", "stage2")  # the rows of the report, in order
# Key in metrics.json -> the two checkpoints; the first is the new one.
COMPARISONS = {
    "stage2_vs_stage1": ("stage2", "stage1"),
    "stage2_vs_control": ("stage2", "stage1-control"),
    "stage1_vs_base": ("stage1", "base"),
}

# In the folder of each trained checkpoint; KEPT_STEPS holds checkpoints of earlier steps, `step_000050` and so on.
RUN_METADATA, TRAIN_LOG, CONTEXT_ROWS = "run_metadata.json", "train_log.jsonl", "context_errors.jsonl"
KEPT_STEPS = "kept"
# In the folder of each evaluated checkpoint: the predictions file, and how the answers were generated.
GT_VS_PRED, DECODE_SUMMARY = "gt_vs_pred.jsonl", "decode.json"


def model_folder(path: str) -> Path:
    """The folder that `model.path` names. A relative path starts in the working directory, or else at the repository.

    The second case is a temporary copy of the repository, which lacks links to models.
    """
    here = Path(path).expanduser()
    return here if here.exists() else repository_root() / here


@dataclass(frozen=True, slots=True)
class ProfilePaths:
    """The folders of one profile under `root` (by default the repository)."""

    profile: str
    root: Path = Path()

    @property
    def inputs(self) -> Path:
        """The inputs of each stage, one file per stage."""
        return self.root / "inputs" / self.profile

    @property
    def raw(self) -> Path:
        """The manifest of the data sets, and composed images."""
        return self.root / "data" / self.profile / "raw"

    @property
    def records(self) -> Path:
        """Records of the splits, categories, and dropped annotations."""
        return self.root / "data" / self.profile / "records"

    @property
    def norm1000(self) -> Path:
        """Tokenized samples, and in `init/` the initial checkpoint with coordinate tokens."""
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
        """Answers of one of `CHECKPOINTS` on val, with the distributions that give boxes and scores."""
        return self.run("decode") / checkpoint

    def evaluation(self, checkpoint: str) -> Path:
        """Predictions of one of `CHECKPOINTS` on val, and their evaluation."""
        return self.run("eval") / checkpoint

    @property
    def metrics(self) -> Path:
        """All metrics of all checkpoints."""
        return self.run("eval") / "metrics.json"

    @property
    def rollout_summary(self) -> Path:
        """What stage 2 found in the stored rollouts: counts, matches, and the training-time F1."""
        return self.run("stage2-rollouts.json")

    @property
    def rollouts(self) -> Path:
        """Stage-1 answers on training images."""
        return self.run("rollout") / "rollouts.jsonl"

    def run_record(self, stage: str) -> Path:
        """Time, machine, and commit of the last run of a stage.

        It is next to the outputs, not in them, so that equal runs give equal bytes. Git ignores it and DVC does not
        track it, so it is absent where the outputs of the stage were restored.
        """
        return self.root / "runs" / self.profile / f"{stage}.run.json"

    @property
    def reports(self) -> Path:
        """Metrics, report, figures, and gallery."""
        return self.root / "reports" / self.profile

    def curve(self, name: str) -> Path:
        """The table that `dvc plots` plots for one stage."""
        return self.reports / "curves" / f"{name}.tsv"
