"""Memory and time of a step with and without --fsdp full_shard, by number of processes, with a plot; and what fits, computed.

    python benchmarks/sharding.py                     # GPT-2 medium's shape, 354 million parameters, 1, 2 and 4 processes
    python benchmarks/sharding.py --layers 4          # a smaller one
    python benchmarks/sharding.py --computed          # only the computed table

Random weights and token ids; every author is in every draw, `--authors` a process. The memory is the peak of a process' resident
set in the timed steps, less what it held before the model was made: weights, sums, moments, what is gathered, activations. glibc
is told to give back what is freed (MALLOC_MMAP_THRESHOLD_), or the peak would be that of the start. Goal: 16 bytes a parameter
over W, the largest layer and activations (as in the row of one process), and 15 %. CPU seconds are those of one process, all
threads; on a busy machine trust them rather than the time.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from throughput import StepTimes, make_data, make_model, run, where
from transformers import TrainerCallback, TrainingArguments

from author_dp.guards.model_check import ModelCheck
from author_dp.training import setup
from data_utils import collate
from dp_utils import DPTrainer, PrivacyArguments

GIB = 2**30
CASES = (("whole", 1), ("whole", 2), ("shares", 2), ("shares", 4))
SIZES = (0.1, 0.35, 1, 3, 8, 13, 34, 70)  # billion parameters
GPUS = (1, 2, 4, 8, 16, 32, 64)
GPU_MEMORY, RESERVE = 80.0, 16.0  # GiB; the reserve is for what is gathered (9 GiB at 70 billion), activations and CUDA itself
ADAPTERS = 0.005  # parameters of LoRA over those of the base


def resident(field: str) -> float:
    """GiB that /proc says of this process: VmRSS now, VmHWM at most since `forget_peak`."""
    line = next(line for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if line.startswith(field))
    return int(line.split()[1]) / 2**20


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


class AfterFirst(TrainerCallback):
    """The moments are made in the first step: forget its peak, and note the CPU seconds of the others."""

    def __init__(self):
        self.cpu = []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            forget_peak()
        self.cpu.append(time.process_time())


def measure(kind: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train in this process as one of WORLD_SIZE."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    torch.set_num_threads(1)
    config = {"n_layer": options.layers, "n_embd": 1024, "n_head": 16, "n_positions": max(64, options.tokens)}
    data = make_data(options.authors * processes, 1, options.tokens)
    before = resident("VmRSS")
    model = make_model(False, **config)
    parameters = sum(p.numel() for p in model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        if processes > 1:
            folder = os.environ["SHARED_FOLDER"]
        arguments = TrainingArguments(
            folder, max_steps=options.steps + 1, per_device_train_batch_size=options.authors, max_grad_norm=0.0, use_cpu=True,
            report_to=[], save_strategy="no", disable_tqdm=True, logging_strategy="no", log_level="error", optim="adamw_torch",
        )  # fmt: skip
        if options.without_proof:
            setup.verify_model = lambda *_: ModelCheck(0.0, set(), [])
        trainer = DPTrainer(
            model,
            arguments,
            PrivacyArguments(noise_multiplier=1.0, per_sample_max_grad_norm=1.0),
            train_dataset=data,
            data_collator=collate,
            sequence_len=options.tokens,
            callbacks=[times := StepTimes(), after := AfterFirst()],
            full_shard=kind == "shares",
        )
        del model
        trainer.train()
    peak = torch.tensor(resident("VmHWM") - before)
    if dist.is_initialized():
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return {
        "parameters": parameters, "memory": float(peak),
        "seconds": statistics.median(times.seconds), "cpu": (after.cpu[-1] - after.cpu[0]) / options.steps,
    }  # fmt: skip


def run_processes(kind: str, processes: int) -> dict[str, Any]:
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(processes)] if processes > 1 else []
    with tempfile.TemporaryDirectory() as folder:
        environment = {"SHARED_FOLDER": folder, "MALLOC_MMAP_THRESHOLD_": str(2**20), "OMP_NUM_THREADS": "1"}
        return run(*launcher, __file__, *sys.argv[1:], "--one", kind, environment=environment)


def measured(options: argparse.Namespace) -> None:
    print(f"{options.authors} authors x {options.tokens} tokens a process and step, one thread each, {where()}\n")
    if options.without_proof:
        print("Without the proof at the start.\n")
    print("| processes | | GiB of a process | goal | CPU s a step | s a step |\n|---|---|---|---|---|---|")
    activations, points = None, []
    for kind, processes in options.cases:
        found = run_processes(kind, processes)
        parameters = found["parameters"]
        if activations is None:
            activations = found["memory"] - 16 * parameters / GIB
        largest = 4 * 50_257 * 1024 / GIB  # the embedding
        most = 1.15 * (16 * parameters / processes / GIB + largest + activations)
        goal = f"{most:.2f}" if kind == "shares" else ""
        points.append((processes, kind, found["memory"], most))
        print(
            f"| {processes} | {kind} | {found['memory']:.2f} | {goal} | {found['cpu']:.1f} | {found['seconds']:.1f} |",
            flush=True,
        )
    print(f"\n{parameters / 1e6:.0f} million parameters; activations, from the first row: {activations:.2f} GiB")
    draw(points, parameters, Path(__file__).with_name("sharding.png"))


def draw(points: list[tuple[int, str, float, float]], parameters: int, path: Path) -> None:
    """Draw the memory of a process against their number, with the goal of those in shares."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 3.4), layout="constrained")
    for kind, label, colour in (("whole", "whole on each process", "#c8553d"), ("shares", "--fsdp full_shard", "#1b6ca8")):
        found = sorted((processes, memory) for processes, of, memory, _ in points if of == kind)
        axes.plot(*zip(*found), "o-", color=colour, label=label)
    goals = sorted((processes, most) for processes, kind, _, most in points if kind == "shares")
    axes.plot(*zip(*goals), ":", color="#8a8f98", label="goal: 16 bytes / W, a layer, activations, +15 %")
    axes.set(xlabel="processes (W)", ylabel="GiB of a process, peak of the steps", ylim=(0, None), xlim=(0.8, None))
    axes.set_xticks(sorted({processes for processes, *_ in points}))
    axes.set_title(f"{parameters / 1e6:.0f} million parameters, full fine-tuning", loc="left", fontweight="bold", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9)
    figure.savefig(path, dpi=150)


def computed() -> None:
    """Print what a GPU holds of weights, sums and moments, in GiB, in the least number of GPUs where that leaves RESERVE free."""
    print(f"Least number of GPUs of {GPU_MEMORY:g} GiB, and GiB of each, {RESERVE:g} GiB left for activations (computed)\n")
    print("| parameters | full | LoRA | LoRA in 4 bits, whole on each |\n|---|---|---|---|")
    for size in SIZES:
        cells = []
        # Bytes a parameter of the base and of the adapters; NF4 with its scales. A base in 4 bits is in no shares.
        for of_all, of_adapters, most in ((16.0, 0.0, GPUS[-1]), (4.0, 16.0, GPUS[-1]), (0.55, 16.0, 1)):
            total = size * 1e9 * (of_all + of_adapters * ADAPTERS) / GIB
            fit = [n for n in GPUS if n <= most and total / n <= GPU_MEMORY - RESERVE]
            cells.append(f"{fit[0]} x {total / fit[0]:.1f}" if fit else "more than 64")
        print(f"| {size:g} billion | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--authors", type=int, default=2, help="of a process, a step")
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--steps", type=int, default=3, help="timed ones")
    parser.add_argument("--cases", nargs="+", default=CASES, type=lambda text: (text.split("x")[0], int(text.split("x")[1])))
    parser.add_argument("--without_proof", action="store_true", help="leave out the proof at the start, minutes on a few cores")
    parser.add_argument("--computed", action="store_true")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        found = measure(options.one, options)
        if int(os.environ.get("RANK", 0)) == 0:
            print(json.dumps(found))
        if dist.is_initialized():
            dist.destroy_process_group()
    elif options.computed:
        computed()
    else:
        measured(options)


if __name__ == "__main__":
    main()
