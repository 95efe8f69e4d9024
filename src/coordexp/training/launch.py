"""Start the processes of a training stage, with torchrun's own launcher."""

from __future__ import annotations

import os
import sys
import uuid

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from coordexp.errors import EXIT_INTERRUPTED, EXIT_USAGE, ConfigError, Interrupted, TrainingError


def run_in_processes(wanted: int) -> bool:
    """Run the command line of this very process in several processes, and wait for them to finish.

    Args:
        wanted: number of processes; 0 is one for each GPU.

    Returns:
        False if there is nothing to start: one process is enough, or this is one of several already.

    Raises:
        Interrupted: the processes stopped on a signal, with the state saved.
        ConfigError: a process refused its configuration, data or checkpoint; its own message stands above.
        TrainingError: a process failed. The others were stopped.
    """
    count = wanted or max(1, torch.cuda.device_count())
    if count == 1 or "WORLD_SIZE" in os.environ:
        return False
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=uuid.uuid4().hex,
        max_restarts=0,  # DVC starts a stage again, which resumes
    )
    try:
        elastic_launch(config, sys.executable)(*sys.orig_argv[1:])
    except SignalException as error:
        raise Interrupted(f"{count} processes were stopped ({error}); run it again.") from error
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        raise _error_of(codes, count) from error
    return True


def _error_of(codes: dict[int, int], count: int) -> Interrupted | ConfigError | TrainingError:
    """What the exit codes of the failed processes by rank amount to; negative ones were ended by a signal."""
    own = {rank: code for rank, code in codes.items() if code > 0}
    listing = ", ".join(f"process {rank} of {count} ended with {code}" for rank, code in sorted(codes.items()))
    if own and set(own.values()) == {EXIT_INTERRUPTED}:
        return Interrupted(f"{listing}; run it again.")
    if EXIT_USAGE in own.values():
        return ConfigError(f"{listing}; its message is above.")
    return TrainingError(f"{listing}; what it said is above. The state that was saved last is kept.")
