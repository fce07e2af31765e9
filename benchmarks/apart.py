"""What it costs to take parameters author by author: python benchmarks/apart.py

Seconds of processor time for one microbatch of a GPT-2 of width 256 with 6 layers, 8 authors of 64 tokens, one thread.
"""

import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import GPT2Config, GPT2LMHeadModel

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from author_dp.clipping.ghost import GhostClipping
from author_dp.mechanism.losses import author_losses

AUTHORS, TOKENS, VOCABULARY, REPEATS = 8, 64, 4_000, 5


def seconds(model: Any, apart: Iterable[Any], max_authors: int) -> float:
    """Return the least time of some repeats."""
    engine = GhostClipping(model, 1.0)
    engine.freeze_fallback(set(apart))
    for parameter in model.parameters():
        parameter.summed_grad = torch.zeros_like(parameter, requires_grad=False)
    ids = torch.randint(VOCABULARY, (AUTHORS, TOKENS))
    times = []
    for _ in range(REPEATS):
        start = time.process_time()
        for part in ids.split(max_authors):
            batch = {"input_ids": part, "labels": part, "author": torch.arange(len(part)), "num_authors": len(part)}
            engine.backward(author_losses(model, batch), batch["author"])
        times.append(time.process_time() - start)
    engine.close()
    return min(times)


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=256, n_layer=6, n_head=4, vocab_size=VOCABULARY))
    norms = [parameter for name, parameter in model.named_parameters() if "ln_1" in name]
    print(f"all by rules: {seconds(model, [], AUTHORS):.3f}")
    print(f"some norms apart, a microbatch an author: {seconds(model, norms, 1):.3f}")
    print(f"some norms apart, all authors in one microbatch: {seconds(model, norms, AUTHORS):.3f}")


if __name__ == "__main__":
    main()
