"""How fast is a step, beside those of other trainers, and with padding? Random weights; nothing is downloaded.

python benchmarks/throughput.py steps                                   # GPT-2 small, 16 authors x 128 tokens, full and LoRA
python benchmarks/throughput.py steps --authors 4 --tokens 512          # longer texts
python benchmarks/throughput.py steps --shape SmolLM2                   # a Llama of SmolLM2-135M's shape
python benchmarks/throughput.py steps --authors 128 --bf16 --steps 30   # where there is a GPU
python benchmarks/throughput.py padding --file speeches.jsonl --tokenizer gpt2 [--constant]
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import torch
from common import (
    DEVICE,
    ROOT,
    SHAPES,
    StepTimes,
    alone,
    alone_command,
    in_turns,
    main,
    make_data,
    make_model,
    make_trainer,
    medians,
    option,
    peak_memory,
    print_head,
    print_row,
    quiet,
    table,
    where,
)
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from opacus.optimizers import DPOptimizerFastGradientClipping
from opacus.utils.fast_gradient_clipping_utils import DPLossFastGradientClipping
from transformers import GPT2TokenizerFast, Trainer, TrainingArguments, default_data_collator

from author_dp.data.columns import get_column
from author_dp.data.tokenization import tokenize
from author_dp.mechanism.microbatches import make_microbatch_shape, make_microbatches
from author_dp.types import IGNORE_INDEX
from data_utils import AuthorDataset, DataArguments, collate, group_by_author, load_train_and_eval

KINDS = ("full", "LoRA")
BF16 = option("--bf16", action="store_true")

# --- trainers side by side ------------------------------------------------------------------------------------

PLAIN, OPACUS, OPAKE = "plain Trainer", "Opacus' ghost mode", "Opake"
ROWS = (PLAIN, "non-private", "ghost", "grad_sample", OPACUS, OPAKE)
VOCABULARY = 49_152  # what both shapes have


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


def train_row(row: str, kind: str, options: dict[str, Any], times: StepTimes) -> dict[str, Any]:
    """Return the peak memory of a row's training, or why it is refused."""
    model = make_model(kind == "LoRA", options["shape"])
    data = make_data(options["authors"], 1, options["tokens"], VOCABULARY)
    given = {"steps": options["steps"], "bf16": options["bf16"]}
    others = {PLAIN: train_plainly, OPACUS: train_with_opacus, OPAKE: train_with_opake}
    if row not in others:
        with tempfile.TemporaryDirectory() as folder:
            make_trainer(row, model, data, folder, trainer={"callbacks": [times]}, **given).train()
    else:
        try:
            others[row](model, data, times=times, **given)
        except (NotImplementedError, ValueError, RuntimeError, ImportError, TypeError) as error:
            return {"refused": str(error).splitlines()[0]}
    return {"memory": peak_memory()}


def answer_in_turn(row: str, kind: str, options: dict[str, Any]) -> None:
    """Measure a row, each step when a line on standard input allows it; answer each with a line of JSON."""
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print

    def turn(seconds: list[float], processor: list[float]) -> None:
        answers.write(json.dumps({"seconds": seconds, "processor": processor}) + "\n")
        sys.stdin.readline()

    answers.write(json.dumps(train_row(row, kind, options, StepTimes(turn))) + "\n")


class RowProcess:
    """One row, in a process of its own that waits after each step."""

    def __init__(self, row: str, kind: str, options: dict[str, Any]):
        self.errors = tempfile.TemporaryFile("w+")
        command = alone_command(answer_in_turn, row=row, kind=kind, options=options)
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

    def resume(self) -> None:
        if not self.end:
            self.process.stdin.write("\n")
            self.process.stdin.flush()
            self.end = self.read()

    def stop(self) -> None:
        if not self.end:  # it waits for its turn, which does not come
            self.process.terminate()
        self.process.communicate()


def take_turns(rows: list[str], kind: str, options: dict[str, Any]) -> list[RowProcess]:
    """Return the processes of these rows, which have ended: each took its steps while the others waited."""
    processes = [RowProcess(row, kind, options) for row in rows]
    while not any("refused" in process.end for process in processes) and not all(process.end for process in processes):
        for process in processes:
            process.resume()
    for process in processes:
        process.stop()
    return processes


@table(
    option("--authors", type=int, default=16, help="authors a step, one sample each"),
    option("--tokens", type=int, default=128, help="tokens a sample"),
    option("--shape", choices=SHAPES, default="GPT-2"),
    option("--steps", type=int, default=8, help="timed steps of each row"),
    option("--kinds", nargs="+", choices=KINDS, default=KINDS),
    option("--rows", nargs="+", choices=ROWS, default=ROWS),
    BF16,
)
def steps(args: argparse.Namespace) -> None:
    """Training steps with and without DP, side by side.

    Each row trains in a process of its own, so that its peak memory is its own, beside one of the first row: the two take their
    steps in turn, and a ratio is the median over pairs of neighboring steps, as a machine's speed changes by more than what is
    measured. The ratio in processor time, of all threads, says how much of the difference is work. A step is everything:
    sampling, collation, forward, backward, clipping, noise, ledger, AdamW.

    The first row is Hugging Face's plain Trainer with its own loss, collator and clipping of the norm: what a user would
    otherwise run. The second is our Trainer with --disable_dp: the same data path, microbatches, loss and optimizer as with DP.
    The last rows are others' DP: Opacus' own ghost mode in a loop of its documentation (no sampling, no ledger), where it takes
    the model at all, and JetBrains' Opake, whose unit is the sample, by its DPTrainer, where it is installed (pip install
    "opake[transformers]").
    """
    print(f"{args.shape}, {args.authors} authors x {args.tokens} tokens a step, {where()}\n")
    print_head("", "tokens/s", "ratio to the first row", "in processor time", "peak memory (GiB)", "ratio")
    for kind in args.kinds:
        for row in args.rows[1:] or args.rows:
            first, other = take_turns([args.rows[0], row], kind, vars(args))
            if "refused" in other.end:
                print_row(f"{kind}, {row}", f"cannot run: {other.end['refused']}", *[""] * 4)
                continue
            for name, process in ((args.rows[0], first), (row, other)):
                ratio = statistics.median(a / b for a, b in zip(first.seconds, process.seconds))
                work = statistics.median(a / b for a, b in zip(first.processor, process.processor))
                rate = args.authors * args.tokens / statistics.median(process.seconds)
                memory, of_first = process.end["memory"], process.end["memory"] / first.end["memory"]
                figures = (f"{rate:,.0f}", *(f"{figure:.2f}" for figure in (ratio, work, memory, of_first)))
                print_row(f"{kind}, {name}", *figures)


# --- padding --------------------------------------------------------------------------------------------------

LONGEST, SORTED = "padded to the longest possible", "sorted by length"


def collate_to(tokens: int, samples: list) -> dict[str, torch.Tensor]:
    """Pad to a fixed length, as most scripts do."""
    batch = collate(samples)
    missing = (0, tokens - batch["input_ids"].shape[1])
    return {name: torch.nn.functional.pad(x, missing, value=IGNORE_INDEX if name == "labels" else 0) for name, x in batch.items()}


def extra_tokens(lengths: np.ndarray, longest: int, per_device: int, accumulation: int, steps: int = 200) -> float:
    """Return by how much constant shapes make the microbatches of a step larger, as a ratio less 1.

    Args:
        lengths: tokens of the samples, int (samples,), of which a step takes a Poisson number at random.
    """
    rng, shape = np.random.default_rng(0), make_microbatch_shape(per_device, accumulation, 1, longest)
    totals = np.zeros(2)
    for _ in range(steps):
        chosen = rng.choice(lengths, rng.poisson(per_device * accumulation))
        authors = [[{"input_ids": np.zeros(length, np.int32)}] for length in chosen]
        for which, form in enumerate((None, shape)):
            totals[which] += sum(b["input_ids"].numel() for b in make_microbatches(authors, per_device, collate, form))
    return float(totals[1] / totals[0] - 1)


def print_extra_tokens(lengths: np.ndarray, longest: int, name: str) -> None:
    print(f"{len(lengths):,} samples of {lengths.mean():.0f} tokens on average, {longest} at most, from {name}\n")
    print_head("per device x accumulation", "authors of a microbatch", "more tokens than as large as the batch")
    for per_device, accumulation in ((8, 32), (64, 4), (32, 2), (64, 1), (128, 8)):
        authors = make_microbatch_shape(per_device, accumulation, 1, longest).authors
        print_row(f"{per_device} x {accumulation}", authors, f"{extra_tokens(lengths, longest, per_device, accumulation):+.0%}")


def read_samples(file: str, tokenizer: str, tokens: int) -> datasets.Dataset:
    samples, _ = load_train_and_eval(DataArguments(train_file=[file], eval_fraction=0.0), seed=0)
    return tokenize(samples, GPT2TokenizerFast.from_pretrained(tokenizer), text_column="content", sequence_len=tokens)


def of_many_authors(samples: datasets.Dataset, authors: int) -> datasets.Dataset:
    """Return one sample of each of so many authors, evenly spread: all rows see the same tokens in every step."""
    offsets, indices = group_by_author(get_column(samples, "author"))
    return samples.select(indices[offsets[:-1]][np.linspace(0, len(offsets) - 2, authors).astype(int)])


def measure_padding(row: str, options: dict[str, Any]) -> list[float]:
    chosen = of_many_authors(read_samples(options["file"], options["tokenizer"], options["tokens"]), options["authors"])
    data = AuthorDataset(chosen, *group_by_author(np.arange(len(chosen))))
    collator = partial(collate_to, options["tokens"]) if row == LONGEST else collate
    size = {
        "per_device_train_batch_size": options["microbatch"],
        "gradient_accumulation_steps": -(-len(chosen) // options["microbatch"]),
    }
    callbacks = {"data_collator": collator, "callbacks": [times := StepTimes()]}
    with tempfile.TemporaryDirectory() as folder:
        make_trainer("ghost", make_model(False), data, folder, steps=options["steps"], trainer=callbacks, **size).train()
    return times.seconds


@table(
    option("--file", default=str(ROOT / "demo" / "comments.jsonl")),
    option("--tokenizer", default=str(ROOT / "demo" / "model")),
    option("--tokens", type=int, default=128, help="longest sample"),
    option("--authors", type=int, default=128, help="authors a step, one sample each"),
    option("--microbatch", type=int, default=16),
    option("--steps", type=int, default=2),
    option("--runs", type=int, default=2),
    option("--constant", action="store_true", help="count the tokens of constant shapes instead"),
)
def padding(args: argparse.Namespace) -> None:
    """Real tokens per second with length-sorted microbatches, against padding every sample to 128.

    GPT-2 small on real text with the columns author and content; without --file, the demo's comments. Both rows train with ghost
    clipping on the same samples of all authors; they differ in the collator alone. With --constant, nothing is trained: the table
    has how many more tokens microbatches of constant shape hold, dummy authors and padding included, than microbatches as large
    as the batch, on average over 200 Poisson samples.
    """
    samples, name = read_samples(args.file, args.tokenizer, args.tokens), Path(args.file).name
    if args.constant:
        return print_extra_tokens(np.array([len(ids) for ids in samples["input_ids"]]), args.tokens, name)
    lengths = [len(ids) for ids in of_many_authors(samples, args.authors)["input_ids"]]
    times = medians(in_turns((LONGEST, SORTED), args.runs, lambda row: alone(measure_padding, row=row, options=vars(args))))
    samples_of = f"{len(lengths)} samples a step in microbatches of {args.microbatch}; {np.mean(lengths):.0f} tokens"
    print(f"GPT-2 small, ghost, {samples_of}\na sample on average, {args.tokens} at most, from {name}; {where()}\n")
    print_head("microbatches", "real tokens/s", "ratio")
    for row, median in times.items():
        print_row(row, f"{sum(lengths) / median:,.0f}", f"{times[LONGEST] / median:.2f}")


if __name__ == "__main__":
    main(__doc__, steps, padding)
