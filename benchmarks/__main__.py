"""Run all or the named benchmarks, each in its own process, and print one table.

    make bench                        # all of MINUTES below; results in benchmarks/results
    make bench BENCH="parse_and_match startup"
    PYTHONPATH=src python -m benchmarks [--quick] [NAME ...]

Each reports its expected time on two idle cores, and its actual time. A figure that cannot be measured here is a row
with the reason. The exit code is 1 if a benchmark failed; a missed target is not an error.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.harness import Row, unmeasured

from benchmarks import harness

SHARED = {"__init__", "__main__", "harness", "coco_like", "tiny_run", "trl_loop"}
ON_DEMAND = {"codec_tokens"}  # take a file of the user's
# Predicted for two idle cores. All of them together are to stay below LIMIT_MINUTES.
MINUTES = {
    "attention": 0.3,
    "bootstrap": 0.8,
    "coco_evaluation": 1.3,
    "convert_coco": 1.7,
    "decoding": 1.3,
    "graph_times": 0.3,
    "growth": 2.6,
    "objective": 2.0,
    "packing_plan": 0.3,
    "parse_and_match": 0.6,
    "rollout_tokens": 2.2,
    "spinning": 3.5,
    "startup": 0.6,
    "training_step": 2.4,
}
LIMIT_MINUTES = 20


def scripts() -> list[str]:
    """The benchmarks of this folder."""
    names = {path.stem for path in Path(__file__).parent.glob("*.py")}
    return sorted(names - SHARED - ON_DEMAND)


def told() -> str:
    """The benchmarks and their minutes."""
    return ", ".join(f"{name} ({MINUTES[name]:g} min)" for name in scripts())


def run(name: str, options: list[str]) -> bool:
    """Run one benchmark; says whether it came to its end."""
    print(f"\n{name}: about {MINUTES[name]:g} minutes", flush=True)
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *options], check=False)
    print(f"{name}: took {(time.perf_counter() - began) / 60:.1f} minutes", flush=True)
    return done.returncode == 0


def main() -> None:
    """Run, then show what the result files hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {told()}  [default: all]")
    parser.add_argument("--quick", action="store_true", help="toy sizes: shows that all work, measures nothing")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder of the result files")
    arguments = parser.parse_args()
    names = arguments.names or scripts()
    if unknown := sorted(set(names) - set(scripts())):
        parser.error(f"no benchmark is called {', '.join(unknown)}; there are {', '.join(scripts())}.")
    options = ["--out", str(arguments.out), *(["--quick"] if arguments.quick else [])]
    broken = [name for name in names if not run(name, options)]
    rows: list[Row] = []
    for name in names:
        rows += [unmeasured(name, "broke; see above")] if name in broken else harness.load(name, arguments.out)
    print(f"\n{harness.table(rows)}")
    raise SystemExit(1 if broken else 0)


if __name__ == "__main__":
    main()
