"""The README's full and LoRA commands as one process at the original's scale. One command, one table.

    python benchmarks/original_scale.py --bf16                      # on a GPU: the whole runs, and where a step's time goes
    python benchmarks/original_scale.py --steps 1 --layers 1 --width 64 --vocabulary 500     # does it run at all?

304,279 authors with 500,000 samples of 128 synthetic token ids, expected batch 1,024 authors, 894 steps, epsilon 8: nothing is
downloaded. Each row trains in a process of its own, sampling, ledger and noise included, model loading and evaluation not.
The first table compares steps with and without privacy at one microbatch, side by side; the second is the whole run; below
it stand the costliest operations of a private step.
"""

import argparse
import statistics
import tempfile
from typing import Any

import numpy as np
import torch
from common import (
    StepTimes,
    alone,
    main,
    make_model,
    make_trainer,
    option,
    peak_memory,
    print_head,
    print_row,
    synchronize,
    table,
    where,
)
from datasets import Dataset
from torch.profiler import ProfilerActivity, profile

from data_utils import AuthorDataset, group_by_author
from dp_utils import DPTrainer

PUBLISHED = {"full": 1_167, "LoRA": 659}  # seconds on 16 V100 GPUs
GOAL = {"full": 240, "LoRA": 150}
STEPS = 894


def synthetic(options: dict[str, Any]) -> AuthorDataset:
    """Every author has a sample; the others' authors are drawn uniformly."""
    generator, authors = np.random.default_rng(0), options["authors"]
    ids = generator.integers(0, options["vocabulary"], (options["samples"], 128), dtype=np.int32)
    owners = np.concatenate([np.arange(authors), generator.integers(0, authors, options["samples"] - authors)])
    return AuthorDataset(Dataset.from_dict({"input_ids": ids}), *group_by_author(owners))


def trainer_of(row: str, kind: str, options: dict[str, Any], folder: str, steps: int, times: StepTimes) -> DPTrainer:
    lora, width = kind == "LoRA", options["width"]
    config = {"n_layer": options["layers"], "n_embd": width, "n_head": width // 64, "vocab_size": options["vocabulary"]}
    return make_trainer(
        row, make_model(lora, **config), synthetic(options), folder, steps=steps - 1, privacy={"target_epsilon": 8.0},
        trainer={"callbacks": [times]}, per_device_train_batch_size=options["microbatch"], bf16=options["bf16"],
        gradient_accumulation_steps=1_024 // options["microbatch"], learning_rate=3e-4 if lora else 1e-4, weight_decay=0.01,
        lr_scheduler_type="constant", dataloader_num_workers=2, logging_strategy="steps", logging_steps=5,
    )  # fmt: skip


def measure(row: str, kind: str, steps: int, options: dict[str, Any]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(row, kind, options, folder, steps, times := StepTimes())
        start = synchronize()
        trainer.train()
        return {"total": synchronize() - start, "seconds": times.seconds, "memory": peak_memory()}


def costliest(options: dict[str, Any]) -> str:
    """Profile two steps of private full fine-tuning."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder, profile(activities=activities) as profiled:
        trainer_of("ghost", "full", options, folder, 2, StepTimes()).train()
    by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    return profiled.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=60)


@table(
    option("--steps", type=int, default=STEPS, help="of the whole run; fewer are scaled up, and said to be"),
    option("--compared_steps", type=int, default=8, help="timed steps of the comparison"),
    option("--microbatch", type=int, default=128, help="authors in memory at once; divides 1,024"),
    option("--authors", type=int, default=304_279),
    option("--samples", type=int, default=500_000),
    option("--layers", type=int, default=12),
    option("--width", type=int, default=768),
    option("--vocabulary", type=int, default=50_257),
    option("--bf16", action="store_true"),
)
def original_scale(args: argparse.Namespace) -> None:
    """Print both tables, and where a step's time goes."""
    options = vars(args)
    print(f"GPT-2, {args.layers} layers of width {args.width}, {'bf16' if args.bf16 else 'float32'}, {where()}\n")
    print_head("step of 1,024 authors x 128 tokens", "seconds", "ratio to non-private", "peak memory (GiB)")
    for kind in ("full", "LoRA"):
        medians = {}
        for row in ("non-private", "ghost"):
            steps = min(args.steps, args.compared_steps) + 1
            result = alone(measure, row=row, kind=kind, steps=steps, options=options)
            medians[row] = statistics.median(result["seconds"])
            ratio = medians["non-private"] / medians[row]
            print_row(f"{kind}, {row}", f"{medians[row]:.3f}", f"{ratio:.2f}", f"{result['memory']:.2f}")
    scaled = "" if args.steps == STEPS else f", scaled up from {args.steps} steps"
    print()
    print_head(f"whole run, {STEPS} steps{scaled}", "seconds", "goal", "published, 16 V100")
    for kind in ("full", "LoRA"):
        total = alone(measure, row="ghost", kind=kind, steps=args.steps, options=options)["total"] * STEPS / args.steps
        print_row(kind, f"{total:.0f}", GOAL[kind], f"{PUBLISHED[kind]:,}")
    print(f"\nCostliest operations of two private steps:\n\n{costliest(options)}")


if __name__ == "__main__":
    main(__doc__, original_scale)
