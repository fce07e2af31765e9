"""Refuse launchers that start unconnected processes, or ask for what the run does not know.

`torch.distributed.run` is the launcher that works. `accelerate launch` sets environment variables behind the run's options, and
srun and mpirun start programs that do not know of each other.

Example:

    >>> check_launcher(args)
"""

import os

from accelerate import Accelerator
from accelerate.utils import DistributedType
from transformers import TrainingArguments

from author_dp.errors import UserError

SUPPORTED_LAUNCHES = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.MULTI_XPU)
MIXED_PRECISION = "ACCELERATE_MIXED_PRECISION"
OTHER_ENGINE = "it changes gradients that must be per author. Leave it out"
LAUNCHER_VARIABLES = {  # of `accelerate launch`: its option, the value without it, and the problem with the remedy
    MIXED_PRECISION: ("--mixed_precision", "no", "unknown to the run. Unset it; for 16-bit speed use --bf16"),
    "ACCELERATE_DYNAMO_BACKEND": (
        "--dynamo_backend", "no", "like --torch_compile it hides the layers from the clipping hooks, and enables TF32. Unset it"
    ),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
        "--gradient_accumulation_steps", "1", "unknown to the run. Unset it, and give the script --gradient_accumulation_steps"
    ),
    "ACCELERATE_USE_DEEPSPEED": ("--use_deepspeed", "false", OTHER_ENGINE),
    "ACCELERATE_USE_FSDP": ("--use_fsdp", "false", f"{OTHER_ENGINE}, and give the script --fsdp full_shard"),
    "ACCELERATE_USE_MEGATRON_LM": ("--use_megatron_lm", "false", OTHER_ENGINE),
    "ACCELERATE_USE_PARALLELISM_CONFIG": ("--use_parallelism_config", "false", OTHER_ENGINE),
    "ACCELERATE_USE_SAGEMAKER": ("with SageMaker", "false", OTHER_ENGINE),
}  # fmt: skip


def check_launcher(args: TrainingArguments) -> None:
    """Raise UserError where a launcher would start unconnected processes, or asks for what the run does not know."""
    if args.world_size != int(os.environ.get("WORLD_SIZE", 1)):
        raise UserError("--use_cpu: the processes of torch.distributed.run are not connected. On CPUs add --use_cpu")
    check_processes_connected()
    check_launcher_variables(args.bf16)


def check_processes_connected() -> None:
    """Raise UserError where a launcher was asked for several processes that know nothing of each other."""
    if "RANK" in os.environ:
        return
    for variable, launcher in (("SLURM_STEP_NUM_TASKS", "srun"), ("OMPI_COMM_WORLD_SIZE", "mpirun"), ("PMI_SIZE", "mpirun")):
        if (number := os.environ.get(variable, "1")).isdecimal() and int(number) > 1:
            raise UserError(
                f"{variable} {number}: {launcher} started that many processes, each a run of its own. Start one "
                "torch.distributed.run for each machine (docs/distributed.md)"
            )
    if os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true" and "MASTER_ADDR" in os.environ:
        raise UserError(
            "accelerate launch --cpu: it starts one process, whatever --num_processes says. On CPUs start them with "
            "torch.distributed.run; for one process give --num_processes 1, and unset MASTER_ADDR"
        )


def check_launcher_variables(bf16: bool) -> None:
    """Raise UserError for an environment variable by which `accelerate launch` asks for what the run does not know.

    Args:
        bf16: --bf16, with which bfloat16 is no surprise.
    """
    for name, (option, without, reason) in LAUNCHER_VARIABLES.items():
        value = os.environ.get(name, without).lower()
        if value not in (without, "", "false", "0") and not (name == MIXED_PRECISION and value == "bf16" and bf16):
            raise UserError(f"{name} {value} (accelerate launch {option}): {reason}")


def check_accelerate_launcher(accelerator: Accelerator, bf16: bool) -> None:
    """Raise UserError where accelerate's own configuration would change the mechanism.

    Args:
        bf16: --bf16, which alone decides whether the run computes in bfloat16.
    """
    is_supported = (
        accelerator.mixed_precision == ("bf16" if bf16 else "no")
        and accelerator.distributed_type in SUPPORTED_LAUNCHES
        and getattr(accelerator, "parallelism_config", None) is None
        and accelerator.gradient_accumulation_steps == 1
    )
    if accelerator.scaler is not None or not is_supported:
        raise UserError(
            f"accelerate launch: its configuration, or an Accelerator made before, asks for {accelerator.mixed_precision} "
            f"precision, {accelerator.distributed_type.value}, or accumulation or parallelism of its own. Use --bf16, and start "
            "processes with torch.distributed.run"
        )
