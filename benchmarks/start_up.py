"""Seconds from the command to the first step: the README's demo, and the same resumed; and of two steps, all in all.

    python benchmarks/start_up.py                              # this checkout
    python benchmarks/start_up.py . ../older [--model FOLDER]  # beside another, run in turn; of another model

Each run is a process of its own, on one thread, its files in a temporary folder. Medians; the first run of each checkout, which
compiles and fills the disk's cache, does not count.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

DEMO = ["--train_file", "demo/comments.jsonl", "--sequence_len", "64"]
PRIVACY = ["--target_epsilon", "8", "--per_sample_max_grad_norm", "1.0"]
STEPS = ["--max_steps", "2", "--save_strategy", "steps", "--save_steps", "1", "--logging_steps", "1", "--disable_tqdm", "True"]


def run(checkout: Path, folder: str, *options: str) -> tuple[float, float]:
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
        fresh, whole = run(checkout, folder, "--model_name", str(model))
        shutil.rmtree(Path(folder) / "checkpoint-2")  # as if it had been broken off: step 2 is taken again, and spent again
        go_on = ["--model_name", str(model), "--target_epsilon", "20", "--resume_from_checkpoint", "True"]
        return fresh, run(checkout, folder, *go_on)[0], whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="*", type=Path, default=[Path(__file__).parents[1]])
    parser.add_argument("--model", type=Path, default=Path(__file__).parents[1] / "demo" / "model")
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    model = args.model.resolve()
    rounds = [[fresh_and_resumed(checkout, model) for checkout in args.checkouts] for _ in range(args.runs + 1)][1:]
    print("| checkout | first step of the demo | of a run that resumes | two steps, all in all |\n|---|---|---|---|")
    for checkout, runs in zip(args.checkouts, zip(*rounds)):
        print(f"| {checkout} | {' s | '.join(f'{statistics.median(seconds):.1f}' for seconds in zip(*runs))} s |")


if __name__ == "__main__":
    main()
