"""The ablation of the objective (`make ablation`): on demand and not in the graph, resumable arm by arm.

    python -m pipelines.ablation --profile tiny --seeds 17 18 19 --stage1-steps 240 --stage2-steps 60
    python -m pipelines.ablation --arms seed_recipe pure_ce          those arms, with their baselines

Needs data/<profile>/ as `dvc repro pack` leaves it. Writes reports/ablations/objective.json and objective.md after each
seed, from all seeds that are finished. Stop it at any time (exit code 75); the same command goes on. Finished arms are
kept in runs/<profile>/ablation/; they know their parameters and data, not the code: remove the folder to start over.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

from coordexp.config.ablation import Arm, Budget, all_arms, choose_arms
from coordexp.config.run import RunConfig
from coordexp.evaluation.ablation import ablation_summary, seed_result
from coordexp.evaluation.evaluator import rounded
from coordexp.infra.files import write_text
from coordexp.infra.provenance import write_json
from coordexp.records.categories import read_categories
from coordexp.reporting.ablation_tables import ablation_markdown
from coordexp.stage import LOG, stage_main
from coordexp.training.ablation import SPLITS, Ablation


def run(budget: Budget, names: Sequence[str], context: RunConfig) -> None:
    """Train and decode what is missing, seed by seed, and report after each."""
    arms = choose_arms(all_arms(Path()), names)
    ablation = Ablation(context, budget)
    folders: dict[str, list[Path]] = {arm.name: [] for arm in arms}
    for seed in budget.seeds:
        for arm in arms:
            folders[arm.name].append(ablation.run(arm, seed))
        _report(context, budget, arms, folders)


def _report(context: RunConfig, budget: Budget, arms: Sequence[Arm], folders: dict[str, list[Path]]) -> None:
    categories = read_categories(context.paths.records / "categories.json")
    results = {
        split: {
            name: [seed_result(f, split, categories, context.params) for f in mine] for name, mine in folders.items()
        }
        for split in SPLITS
    }
    done = len(next(iter(folders.values())))
    shown = asdict(budget) | {"seeds": budget.seeds[:done]}
    summary = ablation_summary(arms, results)
    report = rounded({"profile": context.params.profile, "budget": shown, **summary})
    out = context.paths.root / "reports" / "ablations"
    write_json(out / "objective.json", report)
    write_text(out / "objective.md", ablation_markdown(report))
    LOG.info("ablation: %d of %d seeds in %s", done, len(budget.seeds), out / "objective.md")


def main(argv: Sequence[str]) -> int:
    """Read the budget, and leave the other arguments to what every stage understands."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[17, 18, 19], help="default: %(default)s")
    parser.add_argument("--stage1-steps", type=int, default=240, help="steps of a stage-1 arm (default: %(default)s)")
    parser.add_argument("--stage2-steps", type=int, default=60, help="of the default stage 2 (default: %(default)s)")
    parser.add_argument("--dev-images", type=int, default=250, help="0 is all (default: %(default)s)")
    parser.add_argument("--val-images", type=int, default=0, help="0 is all (default: %(default)s)")
    parser.add_argument("--arms", nargs="*", default=[], help="names of arms (default: all)")
    own, rest = parser.parse_known_args(argv)
    values = {name: value for name, value in vars(own).items() if name not in ("arms", "seeds")}
    return stage_main(partial(run, Budget(seeds=tuple(own.seeds), **values), own.arms), rest)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
