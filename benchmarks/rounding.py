"""How far one author moves the clipped gradients of all others, by nothing but rounding. Prints one table.

    python benchmarks/rounding.py

The kernel of a matrix product follows from its shape, and so does the way in which a norm is computed. Where a microbatch's shape
follows from the sampled authors, one author more changes the gradients of all others. In exact arithmetic they do not move.

The table has the largest movement found when a further author joins in front of the others, with texts of several lengths. Texts
are, for the demo's model and a C below all norms: identical ones, whose rounding errors add up, random ones, and texts of one and
of two tokens. Then, for a tiny GPT-2 that was trained on them and C just below the norm, authors of two texts whose gradients
cancel.
"""

import argparse

import numpy as np
import torch
from throughput import ROOT, where
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from author_dp.clipping import ENGINES
from author_dp.mechanism.losses import author_losses
from author_dp.mechanism.microbatches import make_microbatch_shape, make_microbatches
from data_utils import collate

TOKENS, LENGTH, VOCABULARY = 64, 21, 61
KINDS = ("identical", "random", "one token", "two tokens in turn")
CANCELING = [np.array([3, 5, 7]), np.array([3, 5, 9])]  # texts of one author

Author = list[np.ndarray]  # token ids of each text


def make_authors(kind: str, count: int, vocabulary: int) -> list[Author]:
    """Return `count` authors of one text each."""
    rng = np.random.default_rng(0)
    if kind == "random":
        return [[rng.integers(1, vocabulary, rng.integers(2, LENGTH))] for _ in range(count)]
    if kind == "identical":
        return [[rng.integers(1, vocabulary, LENGTH)]] * count
    return [[np.resize([5] if kind == "one token" else [5, 9], LENGTH)]] * count


def canceling_model() -> tuple[GPT2LMHeadModel, float]:
    """Return a model that was trained on CANCELING until an author's gradient is small, and the norm of that gradient."""
    torch.manual_seed(0)
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=TOKENS, n_embd=16, n_layer=2, n_head=2, **dropout))
    ids = torch.tensor(np.stack(CANCELING))
    batch = {"input_ids": ids, "labels": ids, "author": torch.zeros(2, dtype=torch.long), "num_authors": 1}
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    norm = float("inf")
    for step in range(4_000):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 if step < 300 else 1e-3 if step < 1_500 else 1e-4
        optimizer.zero_grad()
        author_losses(model, batch).sum().backward()
        norm = float(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm())
        if norm < 1e-3:
            break
        optimizer.step()
    return model.eval(), norm


def clipped_sum(model, clip_norm: float, authors: list[Author], first: int, bf16: bool, constant: bool) -> torch.Tensor:
    """Return the clipped sum over the authors of a batch from `first` on, over C, float64."""
    shape = make_microbatch_shape(256, 1, max(map(len, authors)), TOKENS) if constant else None
    engine, total = ENGINES["ghost"](model, clip_norm), 0.0
    rows = [[{"input_ids": ids.astype(np.int32), "number": number} for ids in texts] for number, texts in enumerate(authors)]
    numbers: list[list[int]] = []

    def collate_and_note(samples: list) -> dict:
        numbers.append([sample.get("number", 0) for sample in samples])
        return collate(samples)

    for batch, of_batch in zip(make_microbatches(rows, 256, collate_and_note, shape), numbers):
        for parameter in engine.parameters:
            parameter.summed_grad = torch.zeros_like(parameter, requires_grad=False)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            losses = author_losses(engine.module, batch)
        # The gradient of a loss that is not kept is left out: times zero it is not clipped, and adds nothing.
        of_author = torch.zeros(len(losses), dtype=torch.long).index_reduce(0, batch["author"], torch.tensor(of_batch), "amax")
        engine.backward(losses * (of_author >= first), batch["author"])
        total = total + torch.cat([p.summed_grad.flatten() for p in engine.parameters]).double()
    engine.close()
    return total / clip_norm


def movement(model, clip_norm: float, authors: list[Author], bf16: bool, constant: bool) -> float:
    """Return how far the clipped sum of these authors moves, at most, when one more joins them."""
    alone = clipped_sum(model, clip_norm, authors, 0, bf16, constant)
    joining = [np.arange(10, 10 + length) for length in (2, 5, 8, LENGTH, 40)]
    every = (clipped_sum(model, clip_norm, [[ids], *authors], 1, bf16, constant) for ids in joining)
    return max(float((beside - alone).norm()) for beside in every)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    demo = AutoModelForCausalLM.from_pretrained(ROOT / "demo" / "model").eval()
    tiny, norm = canceling_model()
    print(f"31 or 128 authors, in C; {where()}\n")
    print("| precision | microbatches | most for other texts | texts that cancel |\n|---|---|---|---|")
    for bf16 in (True, False):
        for constant in (False, True):
            cases = ((kind, count) for kind in KINDS for count in (31, 128))
            found = {
                f"{kind}, {count}": movement(demo, 0.05, make_authors(kind, count, demo.config.vocab_size), bf16, constant)
                for kind, count in cases
            }
            worst = max(found, key=found.__getitem__)
            canceling = movement(tiny, 0.999 * norm, [CANCELING] * 128, bf16, constant)
            names = "bfloat16" if bf16 else "float32", "constant shapes" if constant else "as large as the batch"
            print(f"| {names[0]} | {names[1]} | {found[worst]:.2g} ({worst}) | {canceling:.2g} |", flush=True)


if __name__ == "__main__":
    main()
