"""Measure how the time of a step grows with authors, samples per author, tokens, model width and processes.

    python benchmarks/growth.py                    # writes its tables into docs/results.md, and growth.png beside this file

A GPT-2 of 4 layers, by default 256 wide with 8,192 tokens in its vocabulary, random weights and ids; from 16 authors with one
sample of 64 tokens each, one size grows at a time. Medians of steps with everything included; rows alternate. Needs matplotlib.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from datetime import date
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
from throughput import make_data, make_model, train, where

PAGE = Path(__file__).resolve().parent.parent / "docs" / "results.md"
BEGIN, END = "<!-- growth.py: begin -->\n", "<!-- growth.py: end -->\n"
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


def measure(row: str, size: dict[str, int], steps: int) -> None:
    """Print the seconds of steps as JSON; under torch.distributed.run each process has one share, and one thread."""
    processes = size["processes"]
    torch.set_num_threads(max(1, os.cpu_count() // processes))
    model = make_model(False, n_layer=4, n_embd=size["width"], n_head=4, n_positions=512, vocab_size=VOCABULARY)
    data = make_data(size["authors"], size["samples per author"], size["tokens"], VOCABULARY)
    microbatch = min(MICROBATCH, size["authors"] // processes)
    options = {
        "per_device_train_batch_size": microbatch,
        "gradient_accumulation_steps": -(-size["authors"] // (microbatch * processes)),
    }
    seconds = train(row, model, data, steps=steps, k=size["samples per author"], **options)
    if int(os.environ.get("RANK", 0)) == 0:
        print(json.dumps(seconds))
    if dist.is_initialized():
        dist.destroy_process_group()


def seconds_of(row: str, size: dict[str, int], steps: int) -> list[float]:
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", str(size["processes"])] if size["processes"] > 1 else []
    command = [sys.executable, *launcher, __file__, "--steps", str(steps), "--one", row, json.dumps(size)]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": str(os.cpu_count())})
    if done.returncode:
        raise SystemExit(f"{row} {size} failed:\n{done.stderr}")
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("[")))


def plot(results: dict, path: Path) -> None:
    figure, axes = plt.subplots(1, len(GROWTH), figsize=(3.2 * len(GROWTH), 3.4), sharey=False, layout="constrained")
    colors = {"non-private": "#777777", "ghost": "#0b6e99", "grad_sample": "#d9730d"}
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
    figure.savefig(path, dpi=150)


def table(results: dict) -> str:
    lines = []
    for name, values in GROWTH.items():
        lines += [f"| {name} | " + " | ".join(f"{row} (s)" for row in ROWS) + " | ghost | grad_sample |", "|---" * 6 + "|"]
        for value in values:
            times = results[name][value]
            ratios = [times["non-private"] / times[row] for row in ROWS[1:]]
            cells = [f"{value:,}", *(f"{times[row]:.3f}" for row in ROWS), *(f"{ratio:.2f}" for ratio in ratios)]
            lines.append("| " + " | ".join(cells) + " |")
        lines.append("")
    return "\n".join(lines)


def with_tables(page: str, source: str, tables: str) -> str:
    """Return the page with `tables` between its markers.

    Args:
        source: command, date and hardware.
    """
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    assert after, f"{PAGE} lacks the markers"
    return f"{before}{BEGIN}{source}; the last two columns are ratios to non-private.\n\n{tables}{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--runs", type=int, default=2)
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure(options.one[0], json.loads(options.one[1]), options.steps)
        return
    results, measured = {}, {}
    for name, values in GROWTH.items():
        for value in values:
            size = {**BASE, name: value}
            key = json.dumps(size)
            if key not in measured:  # the starting point is common to all
                seconds = {row: [] for row in ROWS}
                for _ in range(options.runs):
                    for row in ROWS:
                        seconds[row] += seconds_of(row, size, options.steps)
                measured[key] = {row: statistics.median(times) for row, times in seconds.items()}
            results.setdefault(name, {})[value] = measured[key]
            print(name, value, measured[key], file=sys.stderr, flush=True)
    plot(results, Path(__file__).with_name("growth.png"))
    page = with_tables(
        PAGE.read_text(encoding="utf-8"), f"`python benchmarks/growth.py`, {date.today()}, {where()}", table(results)
    )
    PAGE.write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
