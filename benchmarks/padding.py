"""Padding is not work: real tokens per second with length-sorted microbatches, against padding every sample to 128.

    python benchmarks/padding.py --file speeches.jsonl --tokenizer gpt2
    python benchmarks/padding.py --file speeches.jsonl --tokenizer gpt2 --constant

GPT-2 small with random weights on real text with the columns author and content; without --file, the demo's comments.
Both rows train with ghost clipping on the same draws of all authors; they differ in the collator alone. Prints one table.
With --constant, nothing is trained: the table has how many more tokens microbatches of constant shape hold, dummy authors and
padding included, than microbatches as large as the batch, on average over 200 Poisson samples.
"""

import argparse
import json
import statistics
from functools import partial
from pathlib import Path

import numpy as np
import torch
from throughput import ROOT, make_model, run, train, where
from transformers import GPT2TokenizerFast

from author_dp.data.authors import get_column
from author_dp.data.tokenization import tokenize
from author_dp.mechanism.microbatches import make_microbatch_shape, make_microbatches
from author_dp.types import IGNORE_INDEX
from data_utils import AuthorDataset, DataArguments, collate, group_by_author, load_train_and_eval

ROWS = ("padded to the longest possible", "sorted by length")


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
    print("| per device x accumulation | authors of a microbatch | more tokens than as large as the batch |\n|---|---|---|")
    for per_device, accumulation in ((8, 32), (64, 4), (32, 2), (64, 1), (128, 8)):
        rows = make_microbatch_shape(per_device, accumulation, 1, longest).authors
        more = extra_tokens(lengths, longest, per_device, accumulation)
        print(f"| {per_device} x {accumulation} | {rows} | {more:+.0%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--file", default=str(ROOT / "demo" / "comments.jsonl"))
    parser.add_argument("--tokenizer", default=str(ROOT / "demo" / "model"))
    parser.add_argument("--tokens", type=int, default=128, help="longest sample")
    parser.add_argument("--authors", type=int, default=128, help="authors a step, one sample each")
    parser.add_argument("--microbatch", type=int, default=16)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--constant", action="store_true", help="count the tokens of constant shapes instead")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()

    samples, _ = load_train_and_eval(DataArguments(train_file=[options.file], eval_fraction=0.0), seed=0)
    tokenizer = GPT2TokenizerFast.from_pretrained(options.tokenizer)
    samples = tokenize(samples, tokenizer, text_column="content", sequence_len=options.tokens)
    if options.constant:
        return print_extra_tokens(np.array([len(ids) for ids in samples["input_ids"]]), options.tokens, Path(options.file).name)
    offsets, indices = group_by_author(get_column(samples, "author"))
    # One sample of each of so many authors, evenly spread: both rows see the same tokens in every step.
    chosen = samples.select(indices[offsets[:-1]][np.linspace(0, len(offsets) - 2, options.authors).astype(int)])
    lengths = [len(ids) for ids in chosen["input_ids"]]
    if options.one:
        collator = partial(collate_to, options.tokens) if options.one == ROWS[0] else collate
        data = AuthorDataset(chosen, *group_by_author(np.arange(len(chosen))))
        size = {
            "per_device_train_batch_size": options.microbatch,
            "gradient_accumulation_steps": -(-len(chosen) // options.microbatch),
        }
        print(json.dumps(train("ghost", make_model(False), data, steps=options.steps, collator=collator, **size)))
        return
    seconds = {row: [] for row in ROWS}
    for _ in range(options.runs):
        for row in ROWS:
            arguments = [f"--{name}={value}" for name, value in vars(options).items() if name != "one"]
            seconds[row] += run(__file__, *arguments, "--one", row)
    print(
        f"GPT-2 small, ghost, {len(chosen)} samples a step in microbatches of {options.microbatch}; {np.mean(lengths):.0f} tokens"
    )
    print(f"a sample on average, {options.tokens} at most, from {Path(options.file).name}; {where()}\n")
    print("| microbatches | real tokens/s | ratio |\n|---|---|---|")
    slowest = statistics.median(seconds[ROWS[0]])
    for row in ROWS:
        median = statistics.median(seconds[row])
        print(f"| {row} | {sum(lengths) / median:,.0f} | {slowest / median:.2f} |")


if __name__ == "__main__":
    main()
