"""Fetch a small public data set into `datasets/` (`make trees`, `make real`); not part of the graph."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from coordexp.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_USAGE, CoordExpError
from coordexp.records.public_sets import PUBLIC_SETS, PublicSet, fetch_set


def main(argv: Sequence[str] | None = None, sets: Mapping[str, PublicSet] = PUBLIC_SETS) -> int:
    """Fetch the set given by the arguments; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("set", choices=sorted(sets), help="name of the data set")
    parser.add_argument("--datasets", type=Path, default=Path("datasets"), help="target folder (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        fetch_set(sets[args.set], args.datasets, lambda line: print(line, flush=True))
    except CoordExpError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_USAGE
    except KeyboardInterrupt:
        print("interrupted: the downloaded files are kept; run the same command again to resume.", file=sys.stderr)
        return EXIT_INTERRUPTED
    return EXIT_DONE


if __name__ == "__main__":
    raise SystemExit(main())
