"""The original example's full and LoRA training on this machine, meant for ten minutes of a GPU. Prints as it goes.

    python benchmarks/original_scale.py --bf16 --microbatch 128                   # the first minutes on a GPU
    python benchmarks/original_scale.py --bf16 --steps 894 --seconds 3600         # the whole runs
    python benchmarks/original_scale.py --steps 3 --batch 32 --microbatch 8 --authors 400 --samples 600 --layers 1 --width 64 \
        --vocabulary 500                                                          # does it run at all?

In this order: are norms and clipped sums those of the CPU; how long is a step, and how long would all 894 be; which operations
cost most. Beside each measured time stands the one that benchmarks/roofline.py computes for an H200, with launches of kernels
hidden and with none hidden.

304,279 authors with 500,000 samples of 128 synthetic token ids, expected batch 1,024 authors, epsilon 8: nothing is downloaded.
A step is everything: sampling, collation, forward, backward, clipping, noise, ledger, AdamW; loading the model and evaluation are
not in it. The plain Trainer is Hugging Face's with its own loss, collator and clipping of the norm. A private microbatch has at
most a sixteenth of the batch's authors.

Ends with status 1 if a norm is not that of the CPU.
"""

import argparse
import copy
import gc
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
from accelerate.utils import send_to_device  # noqa: E402
from datasets import Dataset  # noqa: E402
from peft import LoraConfig, get_peft_model  # noqa: E402
from torch.profiler import ProfilerActivity, profile, supported_activities  # noqa: E402
from transformers import (  # noqa: E402
    GPT2Config,
    GPT2LMHeadModel,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    default_data_collator,
)
from transformers.utils import logging  # noqa: E402

from author_dp.clipping import ClippingEngine  # noqa: E402
from author_dp.mechanism.fsdp_clipping import make_engine  # noqa: E402
from author_dp.mechanism.losses import author_losses  # noqa: E402
from author_dp.mechanism.microbatches import make_microbatch_shape, make_microbatches  # noqa: E402
from author_dp.models.fusion import fuse_operations  # noqa: E402
from author_dp.models.modes import full_precision_sums  # noqa: E402
from data_utils import AuthorDataset, collate, group_by_author  # noqa: E402
from dp_utils import DPTrainer, PrivacyArguments  # noqa: E402

PUBLISHED = {"full": 1_167, "LoRA": 659}  # seconds on 16 V100 GPUs
STEPS, TOKENS = 894, 128
ROWS, KINDS = ("plain", "non-private", "ghost"), ("full", "LoRA")
TOLERANCE = {"float32": 1e-4, "bf16": 1e-2}  # of norms, relative
START = time.perf_counter()


def say(text: str) -> None:
    """Print a line of the running commentary, with the seconds since the start."""
    print(f"[{time.perf_counter() - START:4.0f} s] {text}", flush=True)


def device_type() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def synchronize() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def model_config(options: argparse.Namespace) -> dict[str, int]:
    shape = {"n_layer": options.layers, "n_embd": options.width, "n_head": max(options.width // 64, 1)}
    return {**shape, "vocab_size": options.vocabulary, "bos_token_id": 0, "eos_token_id": 0}


def make_model(lora: bool, options: argparse.Namespace, **config: Any) -> Any:
    """Return GPT-2 with random weights, adapters included, as fine-tune-dp.py prepares one."""
    torch.manual_seed(0)
    model: Any = GPT2LMHeadModel(GPT2Config(**model_config(options), use_cache=False, **config))
    if lora:
        model = get_peft_model(
            model, LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=32, fan_in_fan_out=True, init_lora_weights=False)
        )
    return model


# --- are norms and clipped sums those of the CPU --------------------------------------------------------------


def clip(model: Any, batch: dict[str, Any], device: str, bf16: bool, two_passes: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Return norms (authors,) and the flat clipped sum of a microbatch, on the CPU."""
    model, batch = copy.deepcopy(model).to(device).train(), send_to_device(batch, device)
    if two_passes:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.enable_input_require_grads()
    engine: ClippingEngine = make_engine(model, "ghost", 1.0, checkpointed=two_passes)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.summed_grad = torch.zeros_like(parameter, requires_grad=False)
    with full_precision_sums():
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            losses = author_losses(engine.module, batch)
        norms = engine.backward(losses, batch["author"], batch["samples_each"])
    total = torch.cat([parameter.summed_grad.flatten() for parameter in trained])
    engine.close()
    return norms.cpu(), total.cpu()


def check_against_cpu(options: argparse.Namespace) -> bool:
    """Print how far norms and clipped sums are from the CPU's in the same type; return whether the norms are near."""
    ids = np.random.default_rng(1).integers(0, options.vocabulary, (8, TOKENS), dtype=np.int32)
    authors = [[{"input_ids": row[: TOKENS - 5 * n]}] for n, row in enumerate(ids)]
    (batch,) = make_microbatches(authors, len(authors), collate)
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    print(f"\n| {device_type()} against the CPU | norms, max. relative error | clipped sum | |\n|---|---|---|---|")
    passed = True
    for kind in KINDS:
        model = make_model(kind == "LoRA", options, **dropout)
        fuse_operations(model)
        for dtype in TOLERANCE:
            for two_passes in (False, True):
                expected = clip(model, batch, "cpu", dtype == "bf16", two_passes)
                found = clip(model, batch, device_type(), dtype == "bf16", two_passes)
                norms = ((found[0] - expected[0]).abs() / expected[0]).max().item()
                total = ((found[1] - expected[1]).norm() / expected[1].norm()).item()
                near = norms <= TOLERANCE[dtype]
                passed &= near
                row = f"{kind}, {dtype}{', two passes' if two_passes else ''}"
                verdict = "ok" if near else f"MORE THAN {TOLERANCE[dtype]:g}"
                print(f"| {row} | {norms:.1e} | {total:.1e} | {verdict} |", flush=True)
    return passed


# --- how long is a step ---------------------------------------------------------------------------------------


class StepTimes(TrainerCallback):
    """Seconds of each step, from one step's end to the next one's: with data loading. Ends a training that takes too long."""

    follows = "steps"

    def __init__(self, seconds: float):
        self.ends = [synchronize()]  # the first one is before the training
        self.limit = self.ends[0] + seconds

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.append(synchronize())
        control.should_training_stop |= self.ends[-1] > self.limit and len(self.ends) > 2

    def seconds(self) -> list[float]:
        """Of all steps but the first, which also starts the training."""
        return np.diff(self.ends)[1:].tolist()


class Measured(NamedTuple):
    """What a training took."""

    first: float  # seconds of start and first step
    seconds: list[float]  # of the other steps
    memory: float  # GiB: of the GPU where there is one, of the process otherwise

    def whole_run(self) -> float:
        return self.first + (STEPS - 1) * statistics.mean(self.seconds)


def make_data(options: argparse.Namespace) -> AuthorDataset:
    """Every author has a sample; the others' authors are drawn uniformly."""
    generator = np.random.default_rng(0)
    ids = generator.integers(0, options.vocabulary, (options.samples, TOKENS), dtype=np.int32)
    extra = generator.integers(0, options.authors, options.samples - options.authors)
    authors = np.concatenate([np.arange(options.authors), extra])
    return AuthorDataset(Dataset.from_dict({"input_ids": ids}), *group_by_author(authors))


def make_trainer(row: str, kind: str, data: AuthorDataset, options: argparse.Namespace, folder: str, steps: int) -> Trainer:
    arguments = TrainingArguments(
        output_dir=folder, max_steps=steps, per_device_train_batch_size=options.microbatch, bf16=options.bf16,
        gradient_accumulation_steps=options.batch // options.microbatch, learning_rate=3e-4 if kind == "LoRA" else 1e-4,
        max_grad_norm=1.0 if row == "plain" else 0.0, weight_decay=0.01, lr_scheduler_type="constant", logging_steps=5,
        use_cpu=device_type() == "cpu", dataloader_num_workers=options.workers, report_to=[], save_strategy="no",
        disable_tqdm=True, log_level="error",
    )  # fmt: skip
    model = make_model(kind == "LoRA", options)
    if row == "plain":
        count = min(len(data.samples), (steps + 1) * options.batch)
        ids = data.samples.with_format("numpy")[:count]["input_ids"]
        samples = Dataset.from_dict({"input_ids": ids, "labels": ids})
        return Trainer(model, arguments, default_data_collator, train_dataset=samples)
    fuse_operations(model)
    privacy = {"disable_dp": True} if row == "non-private" else {"target_epsilon": 8.0}
    return DPTrainer(
        model, arguments, PrivacyArguments(**privacy, per_sample_max_grad_norm=1.0), train_dataset=data, data_collator=collate,
        sequence_len=TOKENS, model_name="gpt2 at random",
    )  # fmt: skip


def measure(row: str, kind: str, data: AuthorDataset, options: argparse.Namespace) -> Measured:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(row, kind, data, options, folder, options.steps + 1)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(times := StepTimes(options.seconds))
        trainer.train()
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    if torch.cuda.is_available():
        memory = torch.cuda.max_memory_allocated() / 2**30
    return Measured(times.ends[1] - times.ends[0], times.seconds(), memory)


def costliest(data: AuthorDataset, options: argparse.Namespace) -> str:
    """Profile two steps of private full fine-tuning."""
    activities = supported_activities()
    with tempfile.TemporaryDirectory() as folder, profile(activities=activities) as profiled:
        trainer = make_trainer("ghost", "full", data, options, folder, 2)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    by = "self_cuda_time_total" if ProfilerActivity.CUDA in activities else "self_cpu_time_total"
    return profiled.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=60)


# --- what benchmarks/roofline.py computes ---------------------------------------------------------------------


class Predictions:
    """Times that benchmarks/roofline.py computes meanwhile, in processes of their own."""

    def __init__(self, options: argparse.Namespace):
        config = json.dumps(model_config(options))
        private = make_microbatch_shape(options.microbatch, options.batch // options.microbatch, 1, TOKENS).authors
        self.processes, self.found = {}, {}
        for kind in KINDS:
            for row in ROWS:
                command = [
                    sys.executable, str(ROOT / "benchmarks" / "roofline.py"), "--json", "--row", row, "--kind", kind, "--config",
                    config, "--steps", "1000", "--authors", str(options.batch), "--tokens", str(TOKENS), "--microbatch",
                    str(private if row == "ghost" else options.microbatch), *["--bf16"] * options.bf16,
                ]  # fmt: skip
                environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
                self.processes[row, kind] = subprocess.Popen(
                    command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
                )

    def wait(self) -> None:
        """Wait for all, so that none of them takes time from what is measured."""
        for key, process in self.processes.items():
            out, errors = process.communicate()
            self.found[key] = json.loads(out.splitlines()[-1]) if process.returncode == 0 else None
            if process.returncode:
                say(f"benchmarks/roofline.py failed for {key}: {errors.strip().splitlines()[-1:]}")

    def times(self, row: str, kind: str, steps: int) -> str:
        """Return the seconds of so many steps, with launches hidden and with none hidden."""
        found = self.found[row, kind]
        digits = 4 if steps == 1 else 0
        return "?" if found is None else " to ".join(f"{found[k] / 1000 * steps:.{digits}f}" for k in ("run_s", "run_s_launches"))

    def memory(self, row: str, kind: str) -> str:
        found = self.found[row, kind]
        return "?" if found is None else f"{found['peak_gib']:.2f}"


# --- everything -----------------------------------------------------------------------------------------------


def print_tables(data: AuthorDataset, predictions: Predictions, options: argparse.Namespace) -> None:
    """Train each row, and print the seconds of a step and of the whole run."""
    measured = {}
    print(
        f"\n| step of {options.batch:,} authors x {TOKENS} tokens | seconds | computed for an H200 | plain / row | peak (GiB) | "
        "computed |\n|---|---|---|---|---|---|"
    )
    for kind in KINDS:
        for row in ROWS:
            result = measured[row, kind] = measure(row, kind, data, options)
            step, plain = (statistics.median(measured[name, kind].seconds) for name in (row, "plain"))
            computed = predictions.times(row, kind, 1), predictions.memory(row, kind)
            print(
                f"| {kind}, {row} | {step:.4f} | {computed[0]} | {plain / step:.2f} | {result.memory:.2f} | {computed[1]} |",
                flush=True,
            )
    steps = len(measured["ghost", "full"].seconds) + 1
    scaled = "" if steps >= STEPS else f", scaled up from {steps}"
    print(f"\n| run of {STEPS} steps{scaled} | seconds | computed for an H200 | published, 16 V100 |\n|---|---|---|---|")
    for kind in KINDS:
        for row in ROWS:
            whole = measured[row, kind].whole_run()
            print(f"| {kind}, {row} | {whole:,.0f} | {predictions.times(row, kind, STEPS)} | {PUBLISHED[kind]:,} |", flush=True)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=20, help="of each row, at most; whole runs are scaled up from them")
    parser.add_argument("--seconds", type=float, default=40, help="after which a row ends early")
    parser.add_argument("--microbatch", type=int, default=128, help="authors in memory at once; divides the batch")
    parser.add_argument("--batch", type=int, default=1_024, help="authors expected in a step")
    parser.add_argument("--authors", type=int, default=304_279)
    parser.add_argument("--samples", type=int, default=500_000)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=50_257)
    parser.add_argument("--workers", type=int, default=2, help="of the data loader")
    parser.add_argument("--bf16", action="store_true")
    options = parser.parse_args(arguments)
    if options.batch % options.microbatch or options.samples < options.authors:
        parser.error("--microbatch must divide --batch, and --samples be at least --authors")
    warnings.simplefilter("ignore")
    logging.set_verbosity_error()
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{torch.get_num_threads()} CPU cores"
    dtype = "bf16" if options.bf16 else "float32"
    say(f"GPT-2, {options.layers} layers of width {options.width}, {dtype}, {name}, torch {torch.__version__}")
    predictions = Predictions(options)
    passed = check_against_cpu(options)
    say("making the data, while times are computed")
    data = make_data(options)
    predictions.wait()
    print_tables(data, predictions, options)
    say("profiling")
    print(f"\nCostliest operations of two private steps, full fine-tuning:\n\n{costliest(data, options)}")
    say("done" if passed else "done, but NORMS DIFFER FROM THE CPU'S (first table)")
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
