"""Run every benchmark, or those that are named, in a process of its own each, and print one table.

    make bench                        # about a quarter of an hour on two cores; results in benchmarks/results
    make bench BENCH="parse_and_match startup"
    PYTHONPATH=src python -m benchmarks [--quick] [NAME ...]

What cannot run here is a row that says why. Exit code 1 if a benchmark broke; a target that is missed is no error.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from benchmarks.harness import Row, unmeasured

from benchmarks import harness

SHARED = {"__init__", "__main__", "harness", "coco_like", "tiny_run", "trl_loop"}
ON_DEMAND = {"codec_tokens"}  # take a file of the user's


def scripts() -> list[str]:
    """The benchmarks of this folder."""
    names = {path.stem for path in Path(__file__).parent.glob("*.py")}
    return sorted(names - SHARED - ON_DEMAND)


def run(name: str, options: list[str]) -> bool:
    """Run one benchmark; says whether it came to its end."""
    print(f"\n{name}", flush=True)
    return subprocess.run([sys.executable, "-m", f"benchmarks.{name}", *options], check=False).returncode == 0


def main() -> None:
    """Run, then show what the result files hold."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"any of {', '.join(scripts())}  [default: all]")
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
