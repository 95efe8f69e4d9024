"""What a machine with a GPU is asked first: does everything compute there, is it right, how fast, how much memory.

    make gpu-check [OUT=benchmarks/results/gpu] [DEADLINE=460]
    python -m benchmarks.gpu_check --out DIR --deadline SECONDS [--only NAME ...] [--cpu]

Sections run in order of value until the deadline, each by itself: one that fails is a line with its reason, and the
next one runs. Every result is a line of `results.jsonl` as soon as it is there, with what was predicted beside it;
`results.md` is the table of all lines. `--cpu` runs all of it shrunken: it works, and its times mean nothing.
"""

import coordexp  # noqa: F401  # before torch: says how its allocator works
