"""Training steps with and without DP, side by side in one run. Prints one table.

    python benchmarks/throughput.py                         # GPT-2 small, 16 authors x 128 tokens a step
    python benchmarks/throughput.py --lora
    python benchmarks/throughput.py --authors 64 --bf16     # where there is a GPU

Random weights and token ids in GPT-2 small's shapes; nothing is downloaded. Each row trains in a process of its own, so
that its peak memory is its own; rows alternate, and the medians of their steps are compared. A step is everything:
sampling, collation, forward, backward, clipping, noise, ledger, AdamW.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import datasets  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import GPT2Config, GPT2LMHeadModel, TrainerCallback, TrainingArguments  # noqa: E402

from data_utils import AuthorDataset, collate, group_by_author  # noqa: E402
from dp_utils import DPTrainer, PrivacyArguments  # noqa: E402

ROWS = ("non-private", "ghost", "grad_sample")


class StepTimes(TrainerCallback):
    def __init__(self):
        self.seconds, self.start = [], 0.0

    def synchronize(self):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_step_begin(self, *args, **kwargs):
        self.start = self.synchronize()

    def on_step_end(self, *args, **kwargs):
        self.seconds.append(self.synchronize() - self.start)


def train(row: str, options: argparse.Namespace) -> dict[str, float]:
    """Train a few steps in this process; every author is in every batch, so that all rows do the same work."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config())
    if options.lora:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=32, fan_in_fan_out=True))
    tokens = np.random.default_rng(0).integers(0, 50_257, (options.authors, options.tokens), dtype=np.int32)
    samples = datasets.Dataset.from_dict({"input_ids": tokens})
    privacy = {"disable_dp": True} if row == "non-private" else {"noise_multiplier": 1.0, "clipping": row}
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        trainer = DPTrainer(
            model,
            TrainingArguments(
                output_dir=folder, max_steps=options.steps + 1, per_device_train_batch_size=options.authors, max_grad_norm=0.0,
                use_cpu=not torch.accelerator.is_available(), bf16=options.bf16, report_to=[], save_strategy="no",
                disable_tqdm=True, logging_strategy="no", log_level="error", dataloader_num_workers=0,
            ),
            PrivacyArguments(**privacy, per_sample_max_grad_norm=1.0),
            train_dataset=AuthorDataset(samples, *group_by_author(np.arange(options.authors))),
            data_collator=collate,
            callbacks=[times],
        )  # fmt: skip
        trainer.train()
    gpu = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0
    return {"seconds": times.seconds[1:], "memory": gpu or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--authors", type=int, default=16, help="authors a step, one sample each")
    parser.add_argument("--tokens", type=int, default=128, help="tokens a sample")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a run")
    parser.add_argument("--runs", type=int, default=3, help="runs of each row, in turn")
    parser.add_argument("--lora", action="store_true")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--row", choices=ROWS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.row:
        print(json.dumps(train(options.row, options)))
        return
    seconds, memory = {row: [] for row in ROWS}, {}
    for _ in range(options.runs):
        for row in ROWS:
            command = [sys.executable, __file__, *sys.argv[1:], "--row", row]
            result = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
            seconds[row] += result["seconds"]
            memory[row] = max(memory.get(row, 0.0), result["memory"])
    where = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU cores"
    kind = "LoRA" if options.lora else "full"
    print(f"GPT-2 small, {kind}, {options.authors} authors x {options.tokens} tokens a step, {where}\n")
    print("| row | tokens/s | ratio to non-private | peak memory (GiB) | ratio |\n|---|---|---|---|---|")
    plain = statistics.median(seconds["non-private"])
    for row in ROWS:
        median = statistics.median(seconds[row])
        rate = options.authors * options.tokens / median
        print(f"| {row} | {rate:,.0f} | {plain / median:.2f} | {memory[row]:.2f} | {memory[row] / memory['non-private']:.2f} |")


if __name__ == "__main__":
    main()
