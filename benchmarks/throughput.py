"""Training steps with and without DP, side by side in one run. Prints one table.

    python benchmarks/throughput.py                                   # GPT-2 small, 16 authors x 128 tokens, full and LoRA
    python benchmarks/throughput.py --authors 4 --tokens 512          # longer texts
    python benchmarks/throughput.py --shape SmolLM2                   # a Llama of SmolLM2-135M's shape
    python benchmarks/throughput.py --authors 128 --bf16 --steps 30   # where there is a GPU

Random weights and token ids in the model's shapes; nothing is downloaded. Each row trains in a process of its own, so that its
peak memory is its own, beside one of the first row: the two take their steps in turn, and a ratio is the median over pairs of
neighbouring steps, as a machine's speed changes by more than what is measured. The ratio in processor time, of all threads, says
how much of the difference is work. A step is everything: sampling, collation, forward, backward, clipping, noise, ledger, AdamW.
The first row is Hugging Face's plain Trainer with its own loss, collator and clipping of the norm: what a user would otherwise
run. The second is our Trainer with --disable_dp: the same data path, microbatches, loss and optimizer as with DP. The last rows
are others' DP: Opacus' own ghost mode in a loop of its documentation (no sampling, no ledger), where it takes the model at all,
and JetBrains' Opake, whose unit is the sample, by its DPTrainer, where it is installed (pip install "opake[transformers]").
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
from collections.abc import Callable
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
    """Seconds of each step, by the clock and of all processors, from one step's end to the next one's: with data loading.

    Args:
        turn: called after each step with both lists so far; what it takes is not counted.
    """

    def __init__(self, turn: Callable[[list[float], list[float]], None] = lambda seconds, processor: None):
        self.seconds, self.processor, self.last, self.turn = [], [], None, turn

    def on_step_end(self, *args, **kwargs):
        now = (synchronize(), time.process_time())
        if self.last is not None:
            self.seconds.append(now[0] - self.last[0])
            self.processor.append(now[1] - self.last[1])
        self.turn(self.seconds, self.processor)
        self.last = (synchronize(), time.process_time())


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
    row: str,
    model: torch.nn.Module,
    data: AuthorDataset,
    *,
    steps: int,
    times: StepTimes | None = None,
    k: int = 1,
    collator=collate,
    **options,
) -> list[float]:
    """Return the seconds of `steps` steps after a first one. By default every author is in every batch: rows do equal work."""
    times = times or StepTimes()
    privacy = {"disable_dp": True} if row == "non-private" else {"noise_multiplier": 1.0, "clipping": row}
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


def train_plainly(model: torch.nn.Module, data: AuthorDataset, *, steps: int, times: StepTimes, bf16: bool) -> None:
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(output_dir=folder, bf16=bf16, **quiet(steps, len(data)))
        samples = with_labels(data, steps + 1)
        Trainer(model, arguments, default_data_collator, train_dataset=samples, callbacks=[times]).train()


def train_with_opake(model: torch.nn.Module, data: AuthorDataset, *, steps: int, times: StepTimes, bf16: bool) -> None:
    """Each sample is clipped alone; the batch is Poisson's, of len(data) samples in expectation."""
    from opake.transformers import DPTrainer as OpakeTrainer
    from opake.transformers import TrainingArguments as OpakeArguments

    with tempfile.TemporaryDirectory() as folder:
        arguments = OpakeArguments(
            output_dir=folder, bf16=bf16, clipping_norm=1.0, privacy_noise_multiplier=1.0, remove_unused_columns=False,
            **quiet(steps, len(data)),
        )  # fmt: skip
        samples = with_labels(data, 64)
        OpakeTrainer(model, arguments, default_data_collator, train_dataset=samples, callbacks=[times]).train()


def train_with_opacus(model: torch.nn.Module, data: AuthorDataset, *, steps: int, times: StepTimes, bf16: bool) -> None:
    model = GradSampleModuleFastGradientClipping(model.to(DEVICE).train(), max_grad_norm=1.0, use_ghost_clipping=True)
    parameters = [p for p in model.parameters() if p.requires_grad]
    plain = torch.optim.AdamW(parameters, fused=True)
    optimizer = DPOptimizerFastGradientClipping(plain, noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=len(data))
    criterion = DPLossFastGradientClipping(model, optimizer, torch.nn.CrossEntropyLoss())
    ids = collate([sample for samples in data.__getitems__(list(np.arange(len(data))[:, None])) for sample in samples])
    ids = ids["input_ids"].to(DEVICE)
    positions = torch.arange(ids.shape[1], device=DEVICE).expand_as(ids)
    for _ in range(steps + 1):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
            logits = model(input_ids=ids, position_ids=positions).logits[:, :-1]
            loss = criterion(logits.float().flatten(0, 1), ids[:, 1:].flatten(), shape=logits.shape)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.on_step_end()


def peak_memory() -> float:
    """GiB: of the GPU where there is one, of the process otherwise."""
    if DEVICE.type != "cpu":
        return torch.accelerator.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(row: str, kind: str, options: argparse.Namespace, times: StepTimes) -> dict[str, Any]:
    model, data = make_model(kind == "LoRA", options.shape), make_data(options.authors, 1, options.tokens, VOCABULARY)
    others = {PLAIN: train_plainly, OPACUS: train_with_opacus, OPAKE: train_with_opake}
    if row not in others:
        train(row, model, data, steps=options.steps, times=times, bf16=options.bf16)
    else:
        try:
            others[row](model, data, steps=options.steps, times=times, bf16=options.bf16)
        except (NotImplementedError, ValueError, RuntimeError, ImportError, TypeError) as error:
            return {"refused": str(error).splitlines()[0]}
    return {"memory": peak_memory()}


def answer_in_turn(row: str, kind: str, options: argparse.Namespace) -> None:
    """Measure a row, each step when a line on standard input allows it; answer each with a line of JSON."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print

    def turn(seconds: list[float], processor: list[float]) -> None:
        answers.write(json.dumps({"seconds": seconds, "processor": processor}) + "\n")
        sys.stdin.readline()

    answers.write(json.dumps(measure(row, kind, options, StepTimes(turn))) + "\n")


class RowProcess:
    """One row, in a process of its own that waits after each step."""

    def __init__(self, row: str, kind: str):
        self.errors = tempfile.TemporaryFile("w+")
        command = [sys.executable, __file__, *sys.argv[1:], "--one", row, kind]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True)
        self.seconds: list[float] = []  # of all steps but the first, by the clock
        self.processor: list[float] = []  # and of all processors
        self.end = self.read()  # its peak memory, or why it is refused, once it is there

    def read(self) -> dict[str, Any]:
        answer = self.process.stdout.readline()
        if not answer:
            self.errors.seek(0)
            raise SystemExit(f"{' '.join(self.process.args)} failed:\n{self.errors.read()}")
        answer = json.loads(answer)
        self.seconds, self.processor = answer.pop("seconds", self.seconds), answer.pop("processor", self.processor)
        return answer

    def go_on(self) -> None:
        if not self.end:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
            self.end = self.read()

    def stop(self) -> None:
        if not self.end:  # it waits for its turn, which does not come
            self.process.terminate()
        self.process.communicate()


def take_turns(rows: list[str], kind: str) -> list[RowProcess]:
    """Return the processes of these rows, which have ended: each took its steps while the others waited."""
    processes = [RowProcess(row, kind) for row in rows]
    while not any("refused" in process.end for process in processes) and not all(process.end for process in processes):
        for process in processes:
            process.go_on()
    for process in processes:
        process.stop()
    return processes


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
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each row")
    parser.add_argument("--kinds", nargs="+", choices=("full", "LoRA"), default=("full", "LoRA"))
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        answer_in_turn(*options.one, options)
        return
    print(f"{options.shape}, {options.authors} authors x {options.tokens} tokens a step, {where()}\n")
    print("| | tokens/s | ratio to the first row | in processor time | peak memory (GiB) | ratio |\n|---|---|---|---|---|---|")
    for kind in options.kinds:
        for row in options.rows[1:] or options.rows:
            first, other = take_turns([options.rows[0], row], kind)
            if "refused" in other.end:
                print(f"| {kind}, {row} | cannot run: {other.end['refused']} | | | | |", flush=True)
                continue
            for name, process in ((options.rows[0], first), (row, other)):
                ratio = statistics.median(a / b for a, b in zip(first.seconds, process.seconds))
                work = statistics.median(a / b for a, b in zip(first.processor, process.processor))
                rate = options.authors * options.tokens / statistics.median(process.seconds)
                memory, of_first = process.end["memory"], process.end["memory"] / first.end["memory"]
                print(f"| {kind}, {name} | {rate:,.0f} | {ratio:.2f} | {work:.2f} | {memory:.2f} | {of_first:.2f} |")
            sys.stdout.flush()


if __name__ == "__main__":
    main()
