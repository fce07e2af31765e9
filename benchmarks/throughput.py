"""Training steps with and without DP, side by side in one run. Prints one table.

    python benchmarks/throughput.py                                   # GPT-2 small, 16 authors x 128 tokens, full and LoRA
    python benchmarks/throughput.py --authors 4 --tokens 512          # longer texts
    python benchmarks/throughput.py --shape SmolLM2                   # a Llama of SmolLM2-135M's shape
    python benchmarks/throughput.py --authors 128 --bf16 --runs 5     # where there is a GPU

Random weights and token ids in the model's shapes; nothing is downloaded. Each row trains in a process of its own, so
that its peak memory is its own; rows alternate, and the medians of their steps are compared. A step is everything:
sampling, collation, forward, backward, clipping, noise, ledger, AdamW. All ratios are to the first row, Hugging Face's plain
Trainer with its own loss, collator and clipping of the norm: what a user would otherwise run. The second is our Trainer with
--disable_dp: the same data path, microbatches, loss and optimizer as with DP. The last rows are others' DP: Opacus' own ghost
mode in a loop of its documentation (no sampling, no ledger), where it takes the model at all, and JetBrains' Opake, whose unit is
the sample, by its DPTrainer, where it is installed (pip install "opake[transformers]").
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import datasets  # noqa: E402
import numpy as np  # noqa: E402
import torch  # noqa: E402
from opacus.grad_sample import GradSampleModuleFastGradientClipping  # noqa: E402
from opacus.optimizers import DPOptimizerFastGradientClipping  # noqa: E402
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from transformers import (  # noqa: E402
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)

from data_utils import AuthorDataset, collate, group_by_author  # noqa: E402
from dp_utils import DPTrainer, PrivacyArguments  # noqa: E402

PLAIN, OPACUS, OPAKE = "plain Trainer", "Opacus' ghost mode", "Opake"
ROWS = (PLAIN, "non-private", "ghost", "grad_sample", OPACUS, OPAKE)
SMOLLM2 = {
    "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1_536, "num_hidden_layers": 30, "num_attention_heads": 9,
    "num_key_value_heads": 3, "tie_word_embeddings": True, "max_position_embeddings": 2_048,
}  # fmt: skip
SHAPES = ("GPT-2", "SmolLM2")
VOCABULARY = 49_152  # what both shapes have
DEVICE = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")


def synchronize() -> float:
    if DEVICE.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


class StepTimes(TrainerCallback):
    """Seconds of each step, from one step's end to the next one's: data loading is part of it."""

    def __init__(self):
        self.seconds, self.last = [], None

    def on_step_end(self, *args, **kwargs):
        now = synchronize()
        if self.last is not None:
            self.seconds.append(now - self.last)
        self.last = now


def make_model(lora: bool, shape: str = "GPT-2", **config: Any) -> torch.nn.Module:
    torch.manual_seed(0)
    is_gpt2 = shape == "GPT-2"
    model: Any = GPT2LMHeadModel(GPT2Config(**config)) if is_gpt2 else LlamaForCausalLM(LlamaConfig(**SMOLLM2, **config))
    if lora:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=32, fan_in_fan_out=is_gpt2))
    return model


def make_data(authors: int, samples_per_author: int, tokens: int, vocabulary: int = 50_257) -> AuthorDataset:
    ids = np.random.default_rng(0).integers(0, vocabulary, (authors * samples_per_author, tokens), dtype=np.int32)
    owners = np.repeat(np.arange(authors), samples_per_author)
    return AuthorDataset(datasets.Dataset.from_dict({"input_ids": ids}), *group_by_author(owners))


def train(
    row: str, model: torch.nn.Module, data: AuthorDataset, *, steps: int, k: int = 1, collator=collate, **options
) -> list[float]:
    """Return the seconds of `steps` steps after a first one. By default every author is in every batch: rows do equal work."""
    privacy = {"disable_dp": True} if row == "non-private" else {"noise_multiplier": 1.0, "clipping": row}
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        arguments = {"output_dir": folder, **quiet(steps, len(data)), "max_grad_norm": 0.0}
        trainer = DPTrainer(
            model,
            TrainingArguments(**{**arguments, **options}),
            PrivacyArguments(**privacy, per_sample_max_grad_norm=1.0, samples_per_author=k),
            train_dataset=data,
            data_collator=collator,
            callbacks=[times],
        )
        trainer.train()
    return times.seconds


def quiet(steps: int, batch_size: int) -> dict[str, Any]:
    return {
        "max_steps": steps + 1, "per_device_train_batch_size": batch_size, "use_cpu": DEVICE.type == "cpu", "report_to": [],
        "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no", "log_level": "error",
    }  # fmt: skip


def with_labels(data: AuthorDataset, epochs: int) -> datasets.Dataset:
    """Return the samples as other trainers want them, so often that no epoch ends while steps are timed."""
    ids = np.stack(data.samples.with_format("numpy")["input_ids"][:])
    ids = np.tile(ids, (epochs, 1))
    return datasets.Dataset.from_dict({"input_ids": ids, "labels": ids})


def train_plainly(model: torch.nn.Module, data: AuthorDataset, *, steps: int, bf16: bool) -> list[float]:
    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(output_dir=folder, bf16=bf16, **quiet(steps, len(data)))
        samples = with_labels(data, steps + 1)
        Trainer(model, arguments, default_data_collator, train_dataset=samples, callbacks=[times]).train()
    return times.seconds


def train_with_opake(model: torch.nn.Module, data: AuthorDataset, *, steps: int, bf16: bool) -> list[float]:
    """Each sample is clipped alone; the batch is Poisson's, of len(data) samples in expectation."""
    from opake.transformers import DPTrainer as OpakeTrainer
    from opake.transformers import TrainingArguments as OpakeArguments

    times = StepTimes()
    with tempfile.TemporaryDirectory() as folder:
        arguments = OpakeArguments(
            output_dir=folder, bf16=bf16, clipping_norm=1.0, privacy_noise_multiplier=1.0, remove_unused_columns=False,
            **quiet(steps, len(data)),
        )  # fmt: skip
        samples = with_labels(data, 64)
        OpakeTrainer(model, arguments, default_data_collator, train_dataset=samples, callbacks=[times]).train()
    return times.seconds


def train_with_opacus(model: torch.nn.Module, data: AuthorDataset, *, steps: int, bf16: bool) -> list[float]:
    model = GradSampleModuleFastGradientClipping(model.to(DEVICE).train(), max_grad_norm=1.0, use_ghost_clipping=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    plain = torch.optim.AdamW(parameters, fused=True)
    optimizer = DPOptimizerFastGradientClipping(plain, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=len(data))
    criterion = DPLossFastGradientClipping(model, optimizer, torch.nn.CrossEntropyLoss())
    ids = collate([sample for samples in data.__getitems__(list(np.arange(len(data))[:, None])) for sample in samples])
    ids = ids["input_ids"].to(DEVICE)
    positions = torch.arange(ids.shape[1], device=DEVICE).expand_as(ids)
    seconds = []
    for _ in range(steps + 1):
        start = synchronize()
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
            logits = model(input_ids=ids, position_ids=positions).logits[:, :-1]
            loss = criterion(logits.float().flatten(0, 1), ids[:, 1:].flatten(), shape=logits.shape)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(synchronize() - start)
    return seconds[1:]


def peak_memory() -> float:
    """GiB: of the GPU where there is one, of the process otherwise."""
    if DEVICE.type != "cpu":
        return torch.accelerator.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(row: str, kind: str, options: argparse.Namespace) -> dict[str, Any]:
    model, data = make_model(kind == "LoRA", options.shape), make_data(options.authors, 1, options.tokens, VOCABULARY)
    others = {PLAIN: train_plainly, OPACUS: train_with_opacus, OPAKE: train_with_opake}
    if row not in others:
        seconds = train(row, model, data, steps=options.steps, bf16=options.bf16)
    else:
        try:
            seconds = others[row](model, data, steps=options.steps, bf16=options.bf16)
        except (NotImplementedError, ValueError, RuntimeError, ImportError, TypeError) as error:
            return {"refused": str(error).splitlines()[0]}
    return {"seconds": seconds, "memory": peak_memory()}


def run(script: str, *arguments: str, environment: dict[str, str] | None = None) -> dict[str, Any]:
    """Run this or another benchmark's one measurement in a new process; its last line is JSON.

    Args:
        environment: variables beside those that there are.
    """
    every = {**os.environ, **(environment or {})}
    done = subprocess.run([sys.executable, script, *arguments], capture_output=True, text=True, env=every)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def where() -> str:
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU cores"
    return f"{name}, torch {torch.__version__}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--authors", type=int, default=16, help="authors a step, one sample each")
    parser.add_argument("--tokens", type=int, default=128, help="tokens a sample")
    parser.add_argument("--shape", choices=SHAPES, default="GPT-2")
    parser.add_argument("--steps", type=int, default=4, help="timed steps of a run")
    parser.add_argument("--runs", type=int, default=3, help="runs of each row, in turn")
    parser.add_argument("--kinds", nargs="+", choices=("full", "LoRA"), default=("full", "LoRA"))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one, options)))
        return
    print(f"{options.shape}, {options.authors} authors x {options.tokens} tokens a step, {where()}\n")
    print("| | tokens/s | ratio to the first row | peak memory (GiB) | ratio |\n|---|---|---|---|---|")
    for kind in options.kinds:
        seconds, memory, refused = {row: [] for row in options.rows}, {}, {}
        for _ in range(options.runs):
            for row in options.rows:
                if row not in refused:
                    result = run(__file__, *sys.argv[1:], "--one", row, kind)
                    refused |= {row: result["refused"]} if "refused" in result else {}
                    seconds[row] += result.get("seconds", [])
                    memory[row] = max(memory.get(row, 0.0), result.get("memory", 0.0))
        first = options.rows[0]
        for row in options.rows:
            if row in refused:
                print(f"| {kind}, {row} | cannot run: {refused[row]} | | | |")
                continue
            median = statistics.median(seconds[row])
            ratio, memory_ratio = statistics.median(seconds[first]) / median, memory[row] / memory[first]
            rate = options.authors * options.tokens / median
            print(f"| {kind}, {row} | {rate:,.0f} | {ratio:.2f} | {memory[row]:.2f} | {memory_ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
