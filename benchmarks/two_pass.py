"""A step with --activation_checkpointing: ordinary, ghost clipping by book-keeping, and in two passes. Prints one table.

    python benchmarks/two_pass.py                                     # 2,048 tokens a step, on a CPU
    python benchmarks/two_pass.py --batches 32x1024 --bf16 --runs 5   # 32 authors x 1,024 tokens, where there is a GPU

Random weights and token ids in the shapes of GPT-2 small and SmolLM2-135M (a Llama); nothing is downloaded. Each row runs in a
process of its own; rows alternate, and the medians of their steps are compared. A step is forward, backward, clipping, noise and
AdamW, with GPT-2's dropout; the ordinary one the same without clipping and noise, its gradients in memory all the time, as in a
step of several microbatches. On a CPU the seconds are those of the processor, on one thread, as other work on the machine would
count in any others; and another process measures the memory, its allocator giving back at once what is freed, which takes time:
the peak is of what was in use, not of how it lay.
"""

import argparse
import json
import os
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from peft import LoraConfig, get_peft_model
from throughput import DEVICE, peak_memory, run, synchronize, where
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from author_dp.clipping.ghost import GhostClipping
from author_dp.clipping.two_pass import TwoPassClipping
from author_dp.mechanism.losses import author_losses
from author_dp.mechanism.optimizer import AuthorDPOptimizer

ROWS = {
    "ordinary, not checkpointed": None,
    "ordinary": None,
    "ghost, book-keeping": GhostClipping,
    "ghost, two passes": TwoPassClipping,
}
PLAIN = next(iter(ROWS))
GIVE_BACK = "MALLOC_MMAP_THRESHOLD_"  # glibc's: larger pieces go back to the system when they are freed
SMOL = {"vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1_536, "num_hidden_layers": 30}
SMOL |= {"num_attention_heads": 9, "num_key_value_heads": 3, "max_position_embeddings": 2_048, "tie_word_embeddings": True}
SHAPES = {
    "GPT-2 small": lambda: GPT2LMHeadModel(GPT2Config()),
    "SmolLM2-135M": lambda: LlamaForCausalLM(LlamaConfig(**SMOL)),
}


def make_model(shape: str, kind: str, checkpointed: bool) -> torch.nn.Module:
    torch.manual_seed(0)
    model = SHAPES[shape]()
    if kind == "LoRA":
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, target_modules="all-linear"))
    if checkpointed:
        model.activation_checkpointing_enable()
    return model.to(DEVICE).train()


def measure(row: str, shape: str, kind: str, batch: str, options: argparse.Namespace) -> dict:
    """Return the seconds of each step but the first, and GiB."""
    authors, tokens = map(int, batch.split("x"))
    model = make_model(shape, kind, row != PLAIN)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (authors, tokens), generator=generator).to(DEVICE)
    microbatch = {"input_ids": ids, "labels": ids, "author": torch.arange(authors, device=DEVICE), "num_authors": authors}
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4, fused=True)
    engine = None
    if ROWS[row] is not None:
        optimizer = AuthorDPOptimizer(
            optimizer, noise_multiplier=1.0, clip_norm=1.0, expected_batch_size=authors, before_release=lambda: None
        )
        engine = ROWS[row](model, 1.0)
        engine.freeze_fallback(set())  # as the proof at the start of a run finds
    seconds = []
    for _ in range(options.steps + 1):
        start = now()
        optimizer.zero_grad(set_to_none=False)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=options.bf16):
            losses = author_losses(model, microbatch)
        if engine is None:
            (losses.sum() / authors).backward()
        else:
            engine.backward(losses, microbatch["author"])
        del losses
        optimizer.step()
        seconds.append(now() - start)
    return {"seconds": seconds[1:], "memory": peak_memory()}


def now() -> float:
    return time.process_time() if DEVICE.type == "cpu" else synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--kinds", nargs="+", choices=("full", "LoRA"), default=["full", "LoRA"])
    parser.add_argument("--batches", nargs="+", default=["4x512", "2x1024"], help="authors x tokens")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS)[1:])
    parser.add_argument("--steps", type=int, default=2, help="timed steps of a run")
    parser.add_argument("--runs", type=int, default=2, help="runs of each row, in turn")
    parser.add_argument("--bf16", action="store_true")
    parser.add_argument("--one", nargs=4, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if DEVICE.type == "cpu":
        torch.set_num_threads(1)
    if options.one:
        print(json.dumps(measure(*options.one, options)))
        return
    print(f"Seconds a step, each layer checkpointed, {where()}; ratios to the first row\n")
    print("| | seconds | ratio | peak memory (GiB) | ratio |\n|---|---|---|---|---|")
    for shape in options.shapes:
        for kind in options.kinds:
            for batch in options.batches:
                seconds, memory = {row: [] for row in options.rows}, dict.fromkeys(options.rows, 0.0)
                for _ in range(options.runs):
                    for row in options.rows:
                        os.environ.pop(GIVE_BACK, None)
                        seconds[row] += run(__file__, *sys.argv[1:], "--one", row, shape, kind, batch)["seconds"]
                for row in options.rows:
                    os.environ[GIVE_BACK] = "1048576"
                    memory[row] = run(__file__, *sys.argv[1:], "--steps", "1", "--one", row, shape, kind, batch)["memory"]
                base = options.rows[0]
                for row in options.rows:
                    median = statistics.median(seconds[row])
                    ratio, share = median / statistics.median(seconds[base]), memory[row] / memory[base]
                    name = f"{shape}, {kind}, {batch}: {row}"
                    print(f"| {name} | {median:.2f} | {ratio:.2f} | {memory[row]:.2f} | {share:.2f} |", flush=True)


if __name__ == "__main__":
    main()
