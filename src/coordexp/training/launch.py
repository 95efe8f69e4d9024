"""Start the processes of a training stage, with torchrun's own launcher; or join those that another launcher started.

torchrun, `accelerate launch` and whatever else follows torch's convention say in the environment who a process is and
where the others are. Of a configuration of accelerate only the number and the place of the processes are used.
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

# Between SIGTERM and SIGKILL: to end the step and to save. Torch's 30 s are short for billions of parameters.
SHUTDOWN_S = 120
_WHO = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")  # what init_process_group and the choice of GPU need
# How `accelerate launch` tells a process that accelerate should wrap its model, in the words of its configuration.
_ENGINES = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DEEPSPEED",
    "ACCELERATE_USE_MEGATRON_LM": "MEGATRON_LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "parallelism_config",
}


def run_in_processes(wanted: int) -> bool:
    """Run the command line of this very process in several processes, and wait for them to finish.

    Args:
        wanted: number of processes; 0 is one for each GPU.

    Returns:
        False if there is nothing to start: one process is enough, or this is one that a launcher started.

    Raises:
        ConfigError: a launcher started this process and did not say who it is, or wants what this project does itself.
        Interrupted: the processes stopped on a signal, with the state saved.
        ConfigError: a process refused its configuration, data or checkpoint; its own message stands above.
        TrainingError: a process failed. The others were stopped.
    """
    if "WORLD_SIZE" in os.environ:
        _check_launcher(os.environ)
        return False
    # A device that was chosen otherwise, the CPU or one GPU by its number, is for one process.
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
        max_restarts=0,  # DVC starts a stage again, which resumes
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
        raise ConfigError(f"the environment has WORLD_SIZE {size!r}, expected the number of processes; unset it.")
    if missing := [name for name in _WHO if int(size) > 1 and name not in environment]:
        raise ConfigError(
            f"the environment has WORLD_SIZE {size}, but not {', '.join(missing)}. Expected what torchrun sets: start "
            "this command by torchrun or accelerate launch, or unset WORLD_SIZE."
        )
    if engines := [engine for name, engine in _ENGINES.items() if environment.get(name, "").lower() in ("1", "true")]:
        raise ConfigError(
            f"accelerate is configured for {', '.join(engines)}, which would not be used. Expected distributed_type "
            "MULTI_GPU; to spread weights and moments, set launch.sharding: fsdp2 in the profile."
        )
    if (precision := environment.get("ACCELERATE_MIXED_PRECISION", "no")) != "no":
        log.warning(
            "mixed_precision %s of accelerate is not used; stage1.precision and stage2.precision are", precision
        )


def _error_of(codes: dict[int, int], count: int) -> Interrupted | ConfigError | TrainingError:
    """What the exit codes of the failed processes by rank amount to; negative ones were ended by a signal."""
    own = {rank: code for rank, code in codes.items() if code > 0}
    listing = ", ".join(f"process {rank} of {count} ended with {code}" for rank, code in sorted(codes.items()))
    if own and set(own.values()) == {EXIT_INTERRUPTED}:
        return Interrupted(f"{listing}; run it again.")
    if EXIT_USAGE in own.values():
        return ConfigError(f"{listing}; its message is above.")
    return TrainingError(f"{listing}; what it said is above. The state that was saved last is kept.")
