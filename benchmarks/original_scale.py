"""The README's full and LoRA commands as one process at the original's scale. One command, one table.

    python benchmarks/original_scale.py --bf16                      # on a GPU: the whole runs, and where a step's time goes
    python benchmarks/original_scale.py --steps 1 --layers 1 --width 64 --vocabulary 500     # does it run at all?

304,279 authors with 500,000 samples of 128 synthetic token ids, expected batch 1,024 authors, 894 steps, epsilon 8: nothing is
downloaded. Each row trains in a process of its own, sampling, ledger and noise included, model loading and evaluation not.
The first table compares steps with and without privacy at one microbatch, side by side; the second is the whole run; below
it stand the costliest operations of a private step.
"""

import argparse
import json
import statistics
import tempfile

import numpy as np
import torch
from datasets import Dataset
from throughput import DEVICE, StepTimes, make_model, peak_memory, run, synchronize, where
from torch.profiler import ProfilerActivity, profile
from transformers import TrainingArguments

from data_utils import AuthorDataset, collate, group_by_author
from dp_utils import DPTrainer, PrivacyArguments

PUBLISHED = {"full": 1_167, "LoRA": 659}  # seconds on 16 V100 GPUs
GOAL = {"full": 240, "LoRA": 150}
STEPS = 894


def synthetic(options: argparse.Namespace) -> AuthorDataset:
    """Every author has a sample; the others' authors are drawn uniformly."""
    generator = np.random.default_rng(0)
    ids = generator.integers(0, options.vocabulary, (options.samples, 128), dtype=np.int32)
    extra = generator.integers(0, options.authors, options.samples - options.authors)
    return AuthorDataset(
        Dataset.from_dict({"input_ids": ids}), *group_by_author(np.concatenate([np.arange(options.authors), extra]))
    )


def trainer_of(row: str, kind: str, options: argparse.Namespace, folder: str, steps: int) -> DPTrainer:
    lora = kind == "LoRA"
    config = {"n_layer": options.layers, "n_embd": options.width, "n_head": options.width // 64, "vocab_size": options.vocabulary}
    privacy = {"disable_dp": True} if row == "non-private" else {"target_epsilon": 8.0, "clipping": row}
    arguments = TrainingArguments(
        output_dir=folder, max_steps=steps, per_device_train_batch_size=options.microbatch, max_grad_norm=0.0, bf16=options.bf16,
        gradient_accumulation_steps=1_024 // options.microbatch, learning_rate=3e-4 if lora else 1e-4, weight_decay=0.01,
        lr_scheduler_type="constant", use_cpu=DEVICE.type == "cpu", dataloader_num_workers=2, logging_steps=5, report_to=[],
        save_strategy="no", disable_tqdm=True, log_level="error",
    )  # fmt: skip
    model, times = make_model(lora, **config), StepTimes()
    trainer = DPTrainer(
        model, arguments, PrivacyArguments(**privacy, per_sample_max_grad_norm=1.0),
        train_dataset=synthetic(options), data_collator=collate, callbacks=[times],
    )  # fmt: skip
    trainer.times = times
    return trainer


def measure(row: str, kind: str, steps: int, options: argparse.Namespace) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(row, kind, options, folder, steps)
        start = synchronize()
        trainer.train()
        return {"total": synchronize() - start, "seconds": trainer.times.seconds, "memory": peak_memory()}


def costliest(options: argparse.Namespace) -> str:
    """Profile two steps of private full fine-tuning."""
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * torch.cuda.is_available()
    with tempfile.TemporaryDirectory() as folder, profile(activities=activities) as profiled:
        trainer_of("ghost", "full", options, folder, 2).train()
    by = "self_cuda_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
    return profiled.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=60)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="of the whole run; fewer are scaled up, and said to be")
    parser.add_argument("--compared_steps", type=int, default=8, help="timed steps of the comparison")
    parser.add_argument("--microbatch", type=int, default=128, help="authors in memory at once; divides 1,024")
    parser.add_argument("--authors", type=int, default=304_279)
    parser.add_argument("--samples", type=int, default=500_000)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=50_257)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        row, kind, steps = options.one
        print(costliest(options) if row == "profile" else json.dumps(measure(row, kind, int(steps), options)))
        return
    arguments = [f"--{k}" if v is True else f"--{k}={v}" for k, v in vars(options).items() if v not in (None, False)]
    print(f"GPT-2, {options.layers} layers of width {options.width}, {'bf16' if options.bf16 else 'float32'}, {where()}\n")
    print("| step of 1,024 authors x 128 tokens | seconds | ratio to non-private | peak memory (GiB) |\n|---|---|---|---|")
    for kind in ("full", "LoRA"):
        medians = {}
        for row in ("non-private", "ghost"):
            result = run(__file__, *arguments, "--one", row, kind, str(min(options.steps, options.compared_steps) + 1))
            medians[row] = statistics.median(result["seconds"])
            ratio = medians["non-private"] / medians[row]
            print(f"| {kind}, {row} | {medians[row]:.3f} | {ratio:.2f} | {result['memory']:.2f} |", flush=True)
    scaled = "" if options.steps == STEPS else f", scaled up from {options.steps} steps"
    print(f"\n| whole run, {STEPS} steps{scaled} | seconds | goal | published, 16 V100 |\n|---|---|---|---|")
    for kind in ("full", "LoRA"):
        total = run(__file__, *arguments, "--one", "ghost", kind, str(options.steps))["total"] * STEPS / options.steps
        print(f"| {kind} | {total:.0f} | {GOAL[kind]} | {PUBLISHED[kind]:,} |", flush=True)
    print(f"\nCostliest operations of two private steps:\n\n{costliest(options)}")


if __name__ == "__main__":
    main()
