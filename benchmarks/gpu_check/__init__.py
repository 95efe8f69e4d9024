"""The check of a GPU machine: whether everything runs and is correct, how fast it is, and how much memory it needs.

    make gpu-check [OUT=benchmarks/results/gpu] [DEADLINE=460]
    python -m benchmarks.gpu_check --out DIR --deadline SECONDS [--only NAME ...] [--cpu]

Sections run in order of importance until the deadline, independently: a failure is a line with its reason, and the next
section runs. Every result is written at once as a line of `results.jsonl`, with its prediction; `results.md` is the
table of all lines. `--cpu` runs everything at a small size to test the check itself; its times are meaningless.
"""

import coordexp  # noqa: F401  # before torch: says how its allocator works
