"""Start the processes of a training stage with torchrun's launcher, or join those that another launcher started.

torchrun, `accelerate launch` and other launchers that follow torch's convention set the rank of a process and the
address of the others in the environment. Of an accelerate configuration, only the number and placement of the
processes are used.
"""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Mapping

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from coordexp.errors import EXIT_INTERRUPTED, EXIT_USAGE, ConfigError, Interrupted, TrainingError
from coordexp.infra.device import choose_device

log = logging.getLogger(__name__)

# Between SIGTERM and SIGKILL, to finish the step and save. Torch's 30 s are too short for billions of parameters.
SHUTDOWN_S = 120
_WHO = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # needed by init_process_group and the choice of GPU
# Variables by which `accelerate launch` asks for a wrapped model, and the value of distributed_type that sets them.
_ENGINES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DEEPSPEED",
    "ACCELERATE_USE_MEGATRON_LM": "MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config",
}


def run_in_processes(wanted: int) -> bool:
    """Run the command line of this process in several processes, and wait for them to finish.

    Args:
        wanted: number of processes; 0 means one per GPU.

    Returns:
        False if nothing was started, because one process is enough or a launcher started this one.

    Raises:
        ConfigError: a launcher started this process without setting its rank, or with options that are not supported;
            or a process rejected its configuration, data or checkpoint and printed its own message.
        Interrupted: the processes stopped on a signal, with the state saved.
        TrainingError: a process failed, and the others were stopped.
    """
    if "WORLD_SIZE" in os.environ:
        _check_launcher(os.environ)
        return False
    # If the user chose a device (the CPU, or one GPU by its number), one process runs on it.
    count = wanted or (torch.cuda.device_count() if choose_device() == torch.device("cuda", 0) else 1)
    if count == 1:
        return False
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id=uuid.uuid4().hex,
        max_restarts=0,  # the user repeats the DVC stage, which resumes
        shutdown_timeout=SHUTDOWN_S,
    )
    try:
        elastic_launch(config, sys.executable)(*sys.orig_argv[1:])
    except SignalException as error:
        raise Interrupted(f"{count} processes were stopped ({error}); run it again.") from error
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        raise _error_of(codes, count) from error
    return True


def _check_launcher(environment: Mapping[str, str]) -> None:
    size = environment["WORLD_SIZE"]
    if not size.isdecimal() or int(size) < 1:
        raise ConfigError(f"the environment sets WORLD_SIZE to {size!r}, expected a number of processes; unset it.")
    if missing := [name for name in _WHO if int(size) > 1 and name not in environment]:
        raise ConfigError(
            f"the environment sets WORLD_SIZE to {size}, but not {', '.join(missing)}. Expected the variables that "
            "torchrun sets: start this command with torchrun or accelerate launch, or unset WORLD_SIZE."
        )
    if engines := [engine for name, engine in _ENGINES.items() if environment.get(name, "").lower() in ("1", "true")]:
        raise ConfigError(
            f"accelerate is configured for {', '.join(engines)}, which this project does not use. Expected "
            "distributed_type MULTI_GPU; to shard weights and moments, set launch.sharding: fsdp2 in the profile."
        )
    if (precision := environment.get("ACCELERATE_MIXED_PRECISION", "no")) != "no":
        log.warning(
            "accelerate's mixed_precision %s is ignored; stage1.precision and stage2.precision apply", precision
        )


def _error_of(codes: dict[int, int], count: int) -> Interrupted | ConfigError | TrainingError:
    """The error for the exit codes of failed processes by rank; a negative code means that a signal ended it."""
    own = {rank: code for rank, code in codes.items() if code > 0}
    listing = ", ".join(f"process {rank} of {count} ended with {code}" for rank, code in sorted(codes.items()))
    if own and set(own.values()) == {EXIT_INTERRUPTED}:
        return Interrupted(f"{listing}; run it again.")
    if EXIT_USAGE in own.values():
        return ConfigError(f"{listing}; its message is above.")
    return TrainingError(f"{listing}; its message is above. The last saved state is kept.")
