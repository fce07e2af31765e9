"""How much memory does a training take, by the base's precision, by checkpointing, and by number of processes?

    python benchmarks/memory.py precision             # LoRA on a frozen base in float32, bfloat16 and 4 bits, measured
    python benchmarks/memory.py precision --computed  # of what is in memory beside activations, for larger models
    python benchmarks/memory.py two_pass              # layers checkpointed; 2,048 tokens a step, on a CPU
    python benchmarks/memory.py two_pass --batches 32x1024 --bf16 --runs 5   # 32 authors x 1,024 tokens, where there is a GPU
    python benchmarks/memory.py sharding              # GPT-2 medium's shape, 354 million parameters, 1, 2 and 4 processes
    python benchmarks/memory.py sharding --layers 4   # a smaller one
    python benchmarks/memory.py sharding --computed   # what fits where

Random weights and token ids; nothing is downloaded.
"""

import argparse
import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import (
    DEVICE,
    GIB,
    GIVE_BACK,
    StepTimes,
    alone,
    drawing,
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
    synchronize,
    table,
    where,
)
from transformers import LlamaConfig, LlamaForCausalLM, TrainerCallback

from author_dp.clipping import ENGINES
from author_dp.clipping.ghost import GhostClipping
from author_dp.clipping.two_pass import TwoPassClipping
from author_dp.guards.model_check import ModelCheck
from author_dp.mechanism.losses import author_losses
from author_dp.mechanism.optimizer import AuthorDPOptimizer
from author_dp.models.loading import load_base
from author_dp.models.lora import add_lora_adapters
from author_dp.models.quantization import cast_parameters, nf4_config
from author_dp.models.sizes import num_elements, weight_bytes
from author_dp.training import setup

COMPUTED = option("--computed", action="store_true", help="compute instead of measuring")


def resident(field: str) -> float:
    """GiB that /proc says of this process: VmRSS now, VmHWM at most since `forget_peak`."""
    line = next(line for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines() if line.startswith(field))
    return int(line.split()[1]) / 2**20


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


# --- the base's precision -------------------------------------------------------------------------------------

PRECISIONS = ("float32", "bfloat16", "4 bits")
SHAPE = {"vocab_size": 32_000, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 24}
SHAPE |= {"num_attention_heads": 16, "num_key_value_heads": 8, "max_position_embeddings": 512}
# Layers, width, inner width, of keys and values, vocabulary: of published Llama 3 models, heads of their own but for the first.
LLAMAS = {
    "1.2 billion": (16, 2048, 8192, 512, 128_256, True),
    "3.2 billion": (28, 3072, 8192, 1024, 128_256, True),
    "8.0 billion": (32, 4096, 14_336, 1024, 128_256, False),
    "70.6 billion": (80, 8192, 28_672, 1024, 128_256, False),
}
RANK = 8


def load_llama(folder: str, precision: str) -> Any:
    options: dict[str, Any] = {} if precision == "float32" else {"dtype": torch.bfloat16}
    if precision == "4 bits":
        options |= {"quantization_config": nf4_config(torch.float32), "device_map": {"": torch.device("cpu")}}
    model = add_lora_adapters(load_base(folder, **options), ["all-linear"], r=RANK)
    return model if precision == "float32" else cast_parameters(model)


def measure_precision(precision: str, folder: str, authors: int, tokens: int) -> dict[str, float]:
    """Load, and take the clipped sum of one microbatch of random tokens; GiB beyond what imports take."""
    torch.manual_seed(0)
    before = resident("VmRSS")
    forget_peak()
    model = load_llama(folder, precision)
    loading = resident("VmHWM") - before
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.summed_grad = torch.zeros_like(parameter)
    ids = torch.randint(SHAPE["vocab_size"], (authors, tokens))
    batch = {"input_ids": ids, "labels": ids, "author": torch.arange(authors), "num_authors": authors}
    engine = ENGINES["ghost"](model.train(), 1.0)
    start = time.process_time()
    forget_peak()
    engine.backward(author_losses(engine.module, batch), batch["author"])
    return {"weights": weight_bytes(model) / GIB, "loading": loading, "step": resident("VmHWM") - before,
            "seconds": time.process_time() - start, "parameters": sum(num_elements(p) for p in model.parameters())}  # fmt: skip


def print_computed_precision() -> None:
    """Print weights, and with them adapters, clipped sums and moments of LoRA, in GiB."""
    print_head("Llama of", "adapters", "float32", "bfloat16", "4 bits")
    for name, (layers, width, inner, narrow, vocabulary, tied) in LLAMAS.items():
        matrices = [(width, width)] * 2 + [(width, narrow)] * 2 + [(width, inner)] * 3
        linear = layers * sum(rows * columns for rows, columns in matrices)
        tables = vocabulary * width * (1 if tied else 2)
        norms = (2 * layers + 1) * width
        adapters = layers * RANK * sum(rows + columns for rows, columns in matrices)
        # NF4: half a byte, a byte a block of 64, and 4 for each 256 of these.
        nf4 = linear * (0.5 + 1 / 64 + 4 / (64 * 256)) + 2 * tables
        bases = (4 * (linear + tables), 2 * (linear + tables), nf4)
        cells = (f"{(base + 4 * norms + 16 * adapters) / GIB:.1f}" for base in bases)
        print_row(name, f"{adapters / 1e6:.0f} million", *cells)


@table(option("--authors", type=int, default=2), option("--tokens", type=int, default=64), COMPUTED)
def precision(args: argparse.Namespace) -> None:
    """Memory of LoRA on a frozen base in float32, bfloat16 and 4 bits: of a random Llama, or computed for larger ones."""
    if args.computed:
        return print_computed_precision()
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(folder)
        print(f"{args.authors} authors x {args.tokens} tokens, LoRA of rank {RANK} in all linear layers, one thread\n")
        print_head("base", "weights (GiB)", "peak while loading", "peak of a microbatch", "CPU s")
        environment = {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1", **GIVE_BACK}
        size = {"folder": folder, "authors": args.authors, "tokens": args.tokens}
        for kind in PRECISIONS:
            found = alone(measure_precision, environment=environment, precision=kind, **size)
            print_row(kind, *(f"{found[name]:.2f}" for name in ("weights", "loading", "step")), f"{found['seconds']:.1f}")
        print(f"\n{found['parameters'] / 1e6:.0f} million parameters, adapters included")


# --- two passes over checkpointed layers ----------------------------------------------------------------------

UNCHECKPOINTED = "ordinary, not checkpointed"
CHECKPOINTED = {
    UNCHECKPOINTED: None,
    "ordinary": None,
    "ghost, book-keeping": GhostClipping,
    "ghost, two passes": TwoPassClipping,
}
CHECKPOINTED_SHAPES = {"GPT-2 small": "GPT-2", "SmolLM2-135M": "SmolLM2"}


def now() -> float:
    return time.process_time() if DEVICE.type == "cpu" else synchronize()


def measure_two_pass(row: str, shape: str, kind: str, batch: str, steps: int, bf16: bool) -> dict[str, Any]:
    """Return the seconds of each step but the first, and GiB."""
    if DEVICE.type == "cpu":
        torch.set_num_threads(1)
    authors, tokens = map(int, batch.split("x"))
    model: Any = make_model({"r": 8, "target_modules": "all-linear"} if kind == "LoRA" else False, CHECKPOINTED_SHAPES[shape])
    if row != UNCHECKPOINTED:
        model.gradient_checkpointing_enable()
    model.to(DEVICE).train()
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (authors, tokens), generator=generator).to(DEVICE)
    microbatch = {"input_ids": ids, "labels": ids, "author": torch.arange(authors, device=DEVICE), "num_authors": authors}
    optimizer: Any = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-4, fused=True)
    engine = None
    if CHECKPOINTED[row] is not None:
        optimizer = AuthorDPOptimizer(
            optimizer, noise_multiplier=1.0, clip_norm=1.0, expected_batch_size=authors, before_release=lambda: None
        )
        engine = CHECKPOINTED[row](model, 1.0)
        engine.freeze_fallback(set())  # as the model check at the start of a run finds
    seconds = []
    for _ in range(steps + 1):
        start = now()
        optimizer.zero_grad(set_to_none=False)
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=bf16):
            losses = author_losses(model, microbatch)
        if engine is None:
            (losses.sum() / authors).backward()
        else:
            engine.backward(losses, microbatch["author"])
        del losses
        optimizer.step()
        seconds.append(now() - start)
    return {"seconds": seconds[1:], "memory": peak_memory()}


@table(
    option("--shapes", nargs="+", choices=CHECKPOINTED_SHAPES, default=list(CHECKPOINTED_SHAPES)),
    option("--kinds", nargs="+", choices=("full", "LoRA"), default=("full", "LoRA")),
    option("--batches", nargs="+", default=["4x512", "2x1024"], help="authors x tokens"),
    option("--rows", nargs="+", choices=CHECKPOINTED, default=list(CHECKPOINTED)[1:]),
    option("--steps", type=int, default=2, help="timed steps of a run"),
    option("--runs", type=int, default=2, help="runs of each row, in turn"),
    option("--bf16", action="store_true"),
)
def two_pass(args: argparse.Namespace) -> None:
    """A step with --activation_checkpointing: ordinary, ghost clipping by book-keeping, and in two passes.

    Each row runs in a process of its own; rows take turns, and the medians of their steps are compared. A step is forward,
    backward, clipping, noise and AdamW, with GPT-2's dropout; the ordinary one the same without clipping and noise, its gradients
    in memory all the time, as in a step of several microbatches. On a CPU the seconds are those of the processor, on one thread,
    as other work on the machine would count in any others. Another process measures the memory, as giving memory back takes time.
    """
    if DEVICE.type == "cpu":
        torch.set_num_threads(1)
    print(f"Seconds a step, each layer checkpointed, {where()}; ratios to the first row\n")
    print_head("", "seconds", "ratio", "peak memory (GiB)", "ratio")
    for shape in args.shapes:
        for kind in args.kinds:
            for batch in args.batches:
                case = {"shape": shape, "kind": kind, "batch": batch, "bf16": args.bf16}
                run = partial(alone, measure_two_pass, **case)
                times = medians(in_turns(args.rows, args.runs, lambda row, run=run: run(row=row, steps=args.steps)["seconds"]))
                memory = {row: run(row=row, steps=1, environment=GIVE_BACK)["memory"] for row in args.rows}
                for row in args.rows:
                    ratio, share = times[row] / times[args.rows[0]], memory[row] / memory[args.rows[0]]
                    figures = (f"{figure:.2f}" for figure in (times[row], ratio, memory[row], share))
                    print_row(f"{shape}, {kind}, {batch}: {row}", *figures)


# --- sharding -------------------------------------------------------------------------------------------------

CASES = (("whole", 1), ("whole", 2), ("shares", 2), ("shares", 4))
SIZES = (0.1, 0.35, 1, 3, 8, 13, 34, 70)  # billion parameters
GPUS = (1, 2, 4, 8, 16, 32, 64)
GPU_MEMORY, RESERVE = 80.0, 16.0  # GiB; the reserve is for what is gathered (9 GiB at 70 billion), activations and CUDA itself
ADAPTERS = 0.005  # parameters of LoRA over those of the base


class AfterFirst(TrainerCallback):
    """The moments are made in the first step: forget its peak, and note the CPU seconds of the others."""

    def __init__(self):
        self.cpu = []

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 1:
            forget_peak()
        self.cpu.append(time.process_time())


def measure_sharding(kind: str, folder: str, options: dict[str, Any]) -> dict[str, Any]:
    """Train in this process as one of WORLD_SIZE."""
    torch.set_num_threads(1)
    tokens, authors = options["tokens"], options["authors"]
    data = make_data(authors * int(os.environ.get("WORLD_SIZE", 1)), 1, tokens)
    before = resident("VmRSS")
    model = make_model(False, n_layer=options["layers"], n_embd=1024, n_head=16, n_positions=max(64, tokens))
    parameters = sum(p.numel() for p in model.parameters())
    if options["without_proof"]:
        setup.verify_model = lambda *_: ModelCheck(0.0, set(), [])
    callbacks = {"callbacks": [times := StepTimes(), after := AfterFirst()]}
    trainer = make_trainer(
        "ghost", model, data, folder, steps=options["steps"], per_device_train_batch_size=authors, use_cpu=True,
        optim="adamw_torch", trainer={"sequence_len": tokens, "full_shard": kind == "shares", **callbacks},
    )  # fmt: skip
    del model
    trainer.train()
    peak = torch.tensor(resident("VmHWM") - before)
    if dist.is_initialized():
        dist.all_reduce(peak, op=dist.ReduceOp.MAX)
    return {
        "parameters": parameters, "memory": float(peak),
        "seconds": statistics.median(times.seconds), "cpu": (after.cpu[-1] - after.cpu[0]) / options["steps"],
    }  # fmt: skip


def draw_sharding(points: list[tuple[int, str, float, float]], parameters: int) -> None:
    """Draw the memory of a process against their number, with the goal of those in shares."""
    with drawing("sharding.png", figsize=(6, 3.4)) as (_, axes):
        for kind, label, color in (("whole", "whole on each process", "#c8553d"), ("shares", "--fsdp full_shard", "#1b6ca8")):
            found = sorted((processes, memory) for processes, of, memory, _ in points if of == kind)
            axes.plot(*zip(*found), "o-", color=color, label=label)
        goals = sorted((processes, most) for processes, kind, _, most in points if kind == "shares")
        axes.plot(*zip(*goals), ":", color="#8a8f98", label="goal: 16 bytes / W, a layer, activations, +15 %")
        axes.set(xlabel="processes (W)", ylabel="GiB of a process, peak of the steps", ylim=(0, None), xlim=(0.8, None))
        axes.set_xticks(sorted({processes for processes, *_ in points}))
        axes.set_title(f"{parameters / 1e6:.0f} million parameters, full fine-tuning", loc="left", fontweight="bold", fontsize=11)
        axes.legend(frameon=False, fontsize=9)


def print_computed_sharding() -> None:
    """Print what a GPU holds of weights, sums and moments, in GiB, in the least number of GPUs where that leaves RESERVE free."""
    print(f"Least number of GPUs of {GPU_MEMORY:g} GiB, and GiB of each, {RESERVE:g} GiB left for activations (computed)\n")
    print_head("parameters", "full", "LoRA", "LoRA in 4 bits, whole on each")
    for size in SIZES:
        cells = []
        # Bytes a parameter of the base and of the adapters; NF4 with its scales. A base in 4 bits is in no shares.
        for of_all, of_adapters, most in ((16.0, 0.0, GPUS[-1]), (4.0, 16.0, GPUS[-1]), (0.55, 16.0, 1)):
            total = size * 1e9 * (of_all + of_adapters * ADAPTERS) / GIB
            fit = [n for n in GPUS if n <= most and total / n <= GPU_MEMORY - RESERVE]
            cells.append(f"{fit[0]} x {total / fit[0]:.1f}" if fit else "more than 64")
        print_row(f"{size:g} billion", *cells)


@table(
    option("--layers", type=int, default=24),
    option("--authors", type=int, default=2, help="of a process, a step"),
    option("--tokens", type=int, default=32),
    option("--steps", type=int, default=3, help="timed ones"),
    option("--cases", nargs="+", default=CASES, type=lambda text: (text.split("x")[0], int(text.split("x")[1]))),
    option("--without_proof", action="store_true", help="leave out the model check at the start, minutes on a few cores"),
    COMPUTED,
)
def sharding(args: argparse.Namespace) -> None:
    """Memory and time of a step with and without --fsdp full_shard, by number of processes, with a plot; or what fits, computed.

    Every author is in every batch, `--authors` a process. The memory is the peak of a process' resident set in the timed steps,
    less what it held before the model was made: weights, sums, moments, what is gathered, activations. Goal: 16 bytes a parameter
    over W, the largest layer and activations (as in the row of one process), and 15 %. CPU seconds are those of one process, all
    threads; on a busy machine trust them rather than the time.
    """
    if args.computed:
        return print_computed_sharding()
    print(f"{args.authors} authors x {args.tokens} tokens a process and step, one thread each, {where()}\n")
    if args.without_proof:
        print("Without the model check at the start.\n")
    print_head("processes", "", "GiB of a process", "goal", "CPU s a step", "s a step")
    activations, points, parameters = None, [], 0
    environment = {"OMP_NUM_THREADS": "1", **GIVE_BACK}
    for kind, processes in args.cases:
        with tempfile.TemporaryDirectory() as folder:
            given = {"kind": kind, "folder": folder, "options": vars(args)}
            found = alone(measure_sharding, processes=processes, environment=environment, **given)
        parameters = found["parameters"]
        if activations is None:
            activations = found["memory"] - 16 * parameters / GIB
        largest = 4 * 50_257 * 1024 / GIB  # the embedding
        most = 1.15 * (16 * parameters / processes / GIB + largest + activations)
        points.append((processes, kind, found["memory"], most))
        goal = f"{most:.2f}" if kind == "shares" else ""
        print_row(processes, kind, f"{found['memory']:.2f}", goal, f"{found['cpu']:.1f}", f"{found['seconds']:.1f}")
    print(f"\n{parameters / 1e6:.0f} million parameters; activations, from the first row: {activations:.2f} GiB")
    draw_sharding(points, parameters)


if __name__ == "__main__":
    main(__doc__, precision, two_pass, sharding)
