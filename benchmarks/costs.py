"""What do the pieces of a run cost: noise, the per-author fallback, the start; and how does a step's time grow?

python benchmarks/costs.py growth      # writes its tables into docs/results.md, and growth.png beside this file
python benchmarks/costs.py noise       # one step's noise of GPT-2 small
python benchmarks/costs.py fallback    # parameters without a clipping rule
python benchmarks/costs.py start_up                              # this checkout
python benchmarks/costs.py start_up . ../older [--model FOLDER]  # beside another, run in turn; of another model
"""

import argparse
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import (
    ROOT,
    StepTimes,
    alone,
    drawing,
    format_head,
    format_row,
    in_turns,
    main,
    make_data,
    make_model,
    make_trainer,
    medians,
    option,
    print_head,
    print_row,
    table,
    timed,
    where,
)

from author_dp.clipping.ghost import GhostClipping
from author_dp.mechanism.losses import author_losses
from author_dp.mechanism.noise import GaussianNoise


def time_in_turns(ways: dict[str, Callable], runs: int, clock: Callable[[], float] = time.perf_counter) -> dict[str, float]:
    """Return the median seconds of each way, which take turns."""
    return medians(in_turns(ways, runs, lambda name: [timed(ways[name], clock=clock)[0]]))


# --- growth ---------------------------------------------------------------------------------------------------

PAGE = ROOT / "docs" / "results.md"
BEGIN, END = "<!-- costs.py growth: begin -->\n", "<!-- costs.py growth: end -->\n"
ROWS = ("non-private", "ghost", "grad_sample")
BASE = {"authors": 16, "samples per author": 1, "tokens": 64, "width": 256, "processes": 1}
GROWTH = {
    "authors": (16, 32, 64, 128, 256),
    "samples per author": (1, 2, 4, 8),
    "tokens": (64, 128, 256, 512),
    "width": (128, 256, 512, 1024),
    "processes": (1, 2),
}
VOCABULARY = 8_192
MICROBATCH = 32  # authors in memory at once


def measure_growth(row: str, size: dict[str, int], steps: int) -> list[float]:
    """Return the seconds of steps; under torch.distributed.run each process has a part of the CPU's cores."""
    processes, authors, k = size["processes"], size["authors"], size["samples per author"]
    torch.set_num_threads(max(1, os.cpu_count() // processes))
    model = make_model(False, n_layer=4, n_embd=size["width"], n_head=4, n_positions=512, vocab_size=VOCABULARY)
    data = make_data(authors, k, size["tokens"], VOCABULARY)
    microbatch = min(MICROBATCH, authors // processes)
    options = {"per_device_train_batch_size": microbatch, "gradient_accumulation_steps": -(-authors // (microbatch * processes))}
    with tempfile.TemporaryDirectory() as folder:
        trainer = {"callbacks": [times := StepTimes()]}
        make_trainer(row, model, data, folder, steps=steps, samples_per_author=k, trainer=trainer, **options).train()
    return times.seconds


def growth_table(results: dict) -> str:
    lines = []
    for name, values in GROWTH.items():
        lines.append(format_head(name, *(f"{row} (s)" for row in ROWS), "ghost", "grad_sample"))
        for value in values:
            times = results[name][value]
            ratios = [times["non-private"] / times[row] for row in ROWS[1:]]
            lines.append(format_row(f"{value:,}", *(f"{times[row]:.3f}" for row in ROWS), *(f"{ratio:.2f}" for ratio in ratios)))
        lines.append("")
    return "\n".join(lines)


def draw_growth(results: dict) -> None:
    colors = {"non-private": "#777777", "ghost": "#0b6e99", "grad_sample": "#d9730d"}
    with drawing("growth.png", len(GROWTH), figsize=(3.2 * len(GROWTH), 3.4), sharey=False) as (figure, axes):
        for axis, (name, values) in zip(axes, GROWTH.items()):
            for row in ROWS:
                times = [results[name][value][row] for value in values]
                axis.plot(values, times, marker="o", markersize=4, color=colors[row], label=row)
            axis.set_xscale("log", base=2)
            axis.set_xticks(values, [f"{value:,}" for value in values])
            if len(values) > 2:
                axis.set_yscale("log")
                low, high = axis.get_ylim()
                ticks = [t for t in (0.1, 0.2, 0.3, 0.5, 1, 2, 3, 5, 10, 20) if low <= t <= high]
                axis.set_yticks(ticks, [f"{t:g}" for t in ticks])
            else:
                axis.set_ylim(bottom=0)
            axis.minorticks_off()
            axis.set_xlabel(name)
            axis.grid(alpha=0.3)
        axes[0].set_ylabel("seconds a step")
        axes[0].legend(frameon=False)
        figure.suptitle(f"Time of a training step, {where()}", fontsize=11)


def with_tables(page: str, source: str, tables: str) -> str:
    """Return the page with `tables` between its markers.

    Args:
        source: command, date and hardware.
    """
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    assert after, f"{PAGE} lacks the markers"
    return f"{before}{BEGIN}{source}; the last two columns are ratios to non-private.\n\n{tables}{END}{after}"


@table(option("--steps", type=int, default=3), option("--runs", type=int, default=2))
def growth(args: argparse.Namespace) -> None:
    """How the time of a step grows with authors, samples per author, tokens, model width and processes. Writes results.md.

    A GPT-2 of 4 layers, by default 256 wide with 8,192 tokens in its vocabulary, random weights and ids; from 16 authors with one
    sample of 64 tokens each, one size grows at a time. Medians of steps with everything included; rows take turns.
    """
    results, measured = {}, {}
    for name, values in GROWTH.items():
        for value in values:
            size = {**BASE, name: value}
            key = tuple(size.values())
            if key not in measured:  # the starting point is common to all
                launch = {"processes": size["processes"], "environment": {"OMP_NUM_THREADS": str(os.cpu_count())}}
                run = partial(alone, measure_growth, **launch, size=size, steps=args.steps)
                seconds = in_turns(ROWS, args.runs, lambda row, run=run: run(row=row))
                measured[key] = medians(seconds)
            results.setdefault(name, {})[value] = measured[key]
            print(name, value, measured[key], file=sys.stderr, flush=True)
    draw_growth(results)
    source = f"`python benchmarks/costs.py growth`, {date.today()}, {where()}"
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), source, growth_table(results)), encoding="utf-8")


# --- noise ----------------------------------------------------------------------------------------------------

SIZE, NOISE_RUNS = 124_439_808, 7


@table()
def noise(args: argparse.Namespace) -> None:
    """The noise of one step of GPT-2 small, 124 million normals on the CPU, in several ways."""
    total, threads = torch.ones(SIZE), torch.get_num_threads()
    source, hardened = GaussianNoise(torch.device("cpu")), GaussianNoise(torch.device("cpu"), secure=True)
    generator = torch.Generator()
    philox = [np.random.Generator(np.random.Philox(key=secrets.randbits(128))) for _ in range(threads)]
    parts = np.array_split(total.numpy(), threads)

    def ours(source: GaussianNoise = source) -> None:
        for part in total.split(source.chunk_size):
            source.add_(part, 1.0)

    def numpy() -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda g, part: np.add(part, g.standard_normal(len(part), dtype=np.float32), out=part), philox, parts))

    ways = {
        "this project: AES-128 in counter mode, Box-Muller": ours,
        "the same with --secure_noise: four draws summed": lambda: ours(hardened),
        f"numpy: Philox, ziggurat, {threads} threads": numpy,
        "torch: Mersenne twister (32-bit seed: not private)": lambda: total.add_(torch.empty(SIZE).normal_(generator=generator)),
        "no noise: add 1, the speed of memory": lambda: total.add_(1.0),
    }
    seconds = time_in_turns(ways, NOISE_RUNS)
    print(f"{SIZE:,} normals added in place, {threads} CPU cores, torch {torch.__version__}, medians of {NOISE_RUNS}\n")
    print_head("way", "seconds", "GB/s written")
    for name, median in seconds.items():
        print_row(name, f"{median:.3f}", f"{4 * SIZE / median / 1e9:.1f}")


# --- the per-author fallback ----------------------------------------------------------------------------------

AUTHORS, TOKENS, FALLBACK_VOCABULARY, FALLBACK_RUNS = 8, 64, 4_000, 5


def backward(model: Any, fallback: Iterable[Any], max_authors: int) -> None:
    """Take the clipped sum of all authors, `max_authors` at once; `fallback` are parameters clipped one author at a time."""
    engine = GhostClipping(model, 1.0)
    engine.freeze_fallback(set(fallback))
    for part in torch.randint(FALLBACK_VOCABULARY, (AUTHORS, TOKENS)).split(max_authors):
        batch = {"input_ids": part, "labels": part, "author": torch.arange(len(part)), "num_authors": len(part)}
        engine.backward(author_losses(model, batch), batch["author"])
    engine.close()


@table()
def fallback(args: argparse.Namespace) -> None:
    """CPU seconds of a microbatch where some parameters have no clipping rule, and are clipped one author at a time.

    A GPT-2 of width 256 with 6 layers, 8 authors of 64 tokens, one thread; medians.
    """
    torch.set_num_threads(1)
    model = make_model(False, n_embd=256, n_layer=6, n_head=4, vocab_size=FALLBACK_VOCABULARY)
    for parameter in model.parameters():
        parameter.summed_grad = torch.zeros_like(parameter, requires_grad=False)
    norms = [parameter for name, parameter in model.named_parameters() if "ln_1" in name]
    ways = {
        "all by rules": partial(backward, model, [], AUTHORS),
        "some norms by the fallback, a microbatch an author": partial(backward, model, norms, 1),
        "some norms by the fallback, all authors in one microbatch": partial(backward, model, norms, AUTHORS),
    }
    for name, seconds in time_in_turns(ways, FALLBACK_RUNS, time.process_time).items():
        print(f"{name}: {seconds:.3f}")


# --- the start ------------------------------------------------------------------------------------------------

DEMO = ["--train_file", "demo/comments.jsonl", "--sequence_len", "64"]
PRIVACY = ["--target_epsilon", "8", "--per_sample_max_grad_norm", "1.0"]
STEPS = ["--max_steps", "2", "--save_strategy", "steps", "--save_steps", "1", "--logging_steps", "1", "--disable_tqdm", "True"]


def first_step_and_end(checkout: Path, folder: str, *options: str) -> tuple[float, float]:
    """Return the seconds until the line of the first step came, and until the end."""
    command = [sys.executable, "-u", "fine-tune-dp.py", *DEMO, *PRIVACY, *STEPS, "--output_dir", folder, *options]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    start, first, lines = time.monotonic(), None, []
    with subprocess.Popen(
        command, cwd=checkout, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        for line in process.stdout:
            lines.append(line)
            if first is None and line.startswith("{'loss'"):
                first = time.monotonic() - start
    if process.returncode or first is None:
        sys.exit("".join(lines))
    return first, time.monotonic() - start


def fresh_and_resumed(checkout: Path, model: Path) -> tuple[float, float, float]:
    with tempfile.TemporaryDirectory() as folder:
        fresh, complete = first_step_and_end(checkout, folder, "--model_name", str(model))
        shutil.rmtree(Path(folder) / "checkpoint-2")  # as if it had been broken off: step 2 is taken again, and spent again
        again = ["--model_name", str(model), "--target_epsilon", "20", "--resume_from_checkpoint", "True"]
        return fresh, first_step_and_end(checkout, folder, *again)[0], complete


@table(
    option("checkouts", nargs="*", type=Path, default=[ROOT]),
    option("--model", type=Path, default=ROOT / "demo" / "model"),
    option("--runs", type=int, default=3),
)
def start_up(args: argparse.Namespace) -> None:
    """Seconds from the command to the first step: the README's demo, and the same resumed; and of two steps, all in all.

    Each run is a process of its own, on one thread, its files in a temporary folder. Medians; the first run of each checkout,
    which compiles and fills the disk's cache, does not count.
    """
    model = args.model.resolve()
    runs = in_turns(args.checkouts, args.runs + 1, lambda checkout: [fresh_and_resumed(checkout, model)])
    print_head("checkout", "first step of the demo", "of a run that resumes", "two steps, all in all")
    for checkout, found in runs.items():
        print_row(checkout, *(f"{np.median(seconds):.1f} s" for seconds in zip(*found[1:])))


if __name__ == "__main__":
    main(__doc__, growth, noise, fallback, start_up)
