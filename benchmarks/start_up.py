"""Seconds from the command to the first step: the README's demo, and the same resumed. Prints a table.

    python benchmarks/start_up.py                  # this checkout
    python benchmarks/start_up.py . ../older       # beside another, run in turn

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

DEMO = ["--model_name", "demo/model", "--train_file", "demo/comments.jsonl", "--sequence_len", "64"]
PRIVACY = ["--target_epsilon", "8", "--per_sample_max_grad_norm", "1.0"]
STEPS = ["--max_steps", "2", "--save_strategy", "steps", "--save_steps", "1", "--logging_steps", "1", "--disable_tqdm", "True"]


def seconds_to_first_step(checkout: Path, folder: str, *options: str) -> float:
    """Run to the end; return when the line of the first step came."""
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
    return first


def fresh_and_resumed(checkout: Path) -> tuple[float, float]:
    with tempfile.TemporaryDirectory() as folder:
        fresh = seconds_to_first_step(checkout, folder)
        shutil.rmtree(Path(folder) / "checkpoint-2")  # as if it had been broken off: step 2 is taken again, and spent again
        return fresh, seconds_to_first_step(checkout, folder, "--target_epsilon", "20", "--resume_from_checkpoint", "True")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkouts", nargs="*", type=Path, default=[Path(__file__).parents[1]])
    parser.add_argument("--runs", type=int, default=3)
    args = parser.parse_args()
    rounds = [[fresh_and_resumed(checkout) for checkout in args.checkouts] for _ in range(args.runs + 1)][1:]
    print("| checkout | first step of the demo | of a run that resumes |\n|---|---|---|")
    for checkout, runs in zip(args.checkouts, zip(*rounds)):
        print(f"| {checkout} | {' s | '.join(f'{statistics.median(seconds):.1f}' for seconds in zip(*runs))} s |")


if __name__ == "__main__":
    main()
