"""How far one author moves the clipped gradients of all others, by nothing but rounding. Prints one table.

    python benchmarks/rounding.py

The kernel of a matrix product follows from its shape, and each rounds in its own way. Where a microbatch's shape follows from the
sampled authors, one author more changes the gradients of all others. In exact arithmetic they do not move.

The table has the largest movement found, for the demo's model, ghost clipping and a C below all norms, among several kinds of
texts: identical ones, whose rounding errors add up, random ones, and texts of one and of two tokens. A further author joins in
front of them, with a short text, one of the same length, or a long one.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from throughput import ROOT, where
from transformers import AutoModelForCausalLM

from author_dp.clipping import ENGINES
from author_dp.mechanism import author_losses
from author_dp.microbatches import constant_shape, cut_into_microbatches
from data_utils import collate

CLIP_NORM, TOKENS, LENGTH = 0.05, 64, 21


def texts(kind: str, count: int, rng: np.random.Generator, vocabulary: int) -> list[np.ndarray]:
    """Return the token ids of `count` authors."""
    if kind == "random":
        return [rng.integers(1, vocabulary, rng.integers(2, LENGTH)) for _ in range(count)]
    if kind == "repeated token":
        return [np.full(LENGTH, 5)] * count
    if kind == "two tokens in turn":
        return [np.resize([5, 9], LENGTH)] * count
    return [rng.integers(1, vocabulary, LENGTH)] * count


def clipped_sum(model, rows: list[np.ndarray], first: int, bf16: bool, per_device: int, constant: bool) -> torch.Tensor:
    """Return the clipped sum over the authors of a batch from `first` on, over C, float64."""
    shape = constant_shape(per_device, -(-len(rows) // per_device), 1, TOKENS) if constant else None
    engine, total = ENGINES["ghost"](model, CLIP_NORM), 0.0
    authors = [[{"input_ids": ids.astype(np.int32), "number": number}] for number, ids in enumerate(rows)]
    numbers: list[list[int]] = []

    def collate_and_note(samples: list) -> dict:
        numbers.append([sample.get("number", 0) for sample in samples])
        return collate(samples)

    for batch, of_batch in zip(cut_into_microbatches(authors, per_device, collate_and_note, shape), numbers):
        for parameter in engine.parameters:
            parameter.summed_grad = torch.zeros_like(parameter, requires_grad=False)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            losses = author_losses(engine.module, batch)
        # The gradient of a loss that is not kept is left out: times zero it is not clipped, and adds nothing.
        mask = torch.tensor([float(number >= first) for number in of_batch])
        engine.backward(losses * mask, batch["author"])
        total = total + torch.cat([p.summed_grad.flatten() for p in engine.parameters]).double()
    engine.close()
    return total / CLIP_NORM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=str(ROOT / "demo" / "model"))
    parser.add_argument("--authors", type=int, nargs="+", default=[31, 128])
    parser.add_argument("--per_device", type=int, nargs="+", default=[256])
    options = parser.parse_args()
    model = AutoModelForCausalLM.from_pretrained(Path(options.model)).eval()
    vocabulary = model.config.vocab_size
    print(f"{Path(options.model).name}, up to {max(options.authors)} authors and one more, in C; {where()}\n")
    print("| precision | microbatches | texts | authors | others move by |\n|---|---|---|---|---|")
    for bf16 in (True, False):
        for constant in (False, True):
            worst = (0.0, "", 0)
            for kind in ("identical", "random", "repeated token", "two tokens in turn"):
                for count in options.authors:
                    for per_device in options.per_device:
                        rows = texts(kind, count, np.random.default_rng(0), vocabulary)
                        alone = clipped_sum(model, rows, 0, bf16, per_device, constant)
                        for joining in (np.array([3, 4]), np.arange(LENGTH), np.arange(TOKENS)):
                            beside = clipped_sum(model, [joining, *rows], 1, bf16, per_device, constant)
                            worst = max(worst, (float((beside - alone).norm()), kind, count))
            names = "bfloat16" if bf16 else "float32", "constant shapes" if constant else "as large as the batch"
            print(f"| {names[0]} | {names[1]} | {worst[1]} | {worst[2]} | {worst[0]:.2g} |", flush=True)


if __name__ == "__main__":
    main()
