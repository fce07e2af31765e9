"""Measure what epsilon, LoRA, batch, schedule, samples per author and clip norm do to the evaluation loss.

Prints the tables of docs/results.md: epsilon, recipe, LoRA, few authors.

python benchmarks/results.py [--only epsilon|recipe|lora] [--repetitions 3] [--parallel 2] [--cache results.jsonl]
python benchmarks/results.py --plays FILE       # few authors: any file of author and content; here the roles of plays

Every run is the script itself with the demo's model, on its corpus or on FILE, in a folder of its own; the evaluation loss is
that of held-out authors. Runs that are in the cache are not repeated. Writes epsilon.png and plays.png beside this file.
"""

import argparse
import functools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DATA = f"--model_name {ROOT}/demo/model --train_file {ROOT}/demo/comments.jsonl --sequence_len 64 --disable_tqdm True"
QUIET = "--save_strategy no --log_level warning --per_sample_max_grad_norm 1.0"
FULL = "--learning_rate 5e-3 --lr_scheduler_type cosine"
LORA = "--learning_rate 3e-2 --lr_scheduler_type cosine --enable_lora"


def batch(authors: int) -> str:
    return f"--per_device_train_batch_size 64 --gradient_accumulation_steps {authors // 64} --num_train_epochs 2"


def private(epsilon: float | None) -> str:
    return "--disable_dp" if epsilon is None else f"--target_epsilon {epsilon}"


def full(authors: int, rate: str, schedule: str = "constant", epsilon: float | None = 8) -> str:
    return f"{batch(authors)} --learning_rate {rate} --lr_scheduler_type {schedule} {private(epsilon)}"


DEMO = "The demo's corpus, two epochs"
CONSTANT = "--lr_scheduler_type constant"
EPSILON = {
    (name, epsilon): f"{batch(256)} {options} {private(epsilon)}"
    for epsilon in (1, 2, 4, 8, None)
    for name, options in (("full", FULL), ("LoRA", LORA))
}
# All of them process two epochs' worth of samples; the order of options is that of EPSILON, so that the cache serves both.
BEST = full(256, "5e-3")
TWO = full(1024, "5e-3", "cosine").replace("epochs 2", "epochs 1.5") + " --samples_per_author 2"
RECIPE = {
    "the original: batch 1024, constant 1e-4": full(1024, "1e-4"),
    "batch 1024, constant 1e-3": full(1024, "1e-3"),
    "batch 1024, constant 5e-3": full(1024, "5e-3"),
    "batch 1024, cosine 5e-3": full(1024, "5e-3", "cosine"),
    "batch 1024, cosine 1e-2": full(1024, "1e-2", "cosine"),
    "batch 1024, cosine 5e-3, two samples per author": TWO,
    "batch 1024, cosine 5e-3, clip norm 0.1": full(1024, "5e-3", "cosine") + " --per_sample_max_grad_norm 0.1",
    "batch 1024, cosine 5e-3, Adam's beta2 0.95": full(1024, "5e-3", "cosine") + " --adam_beta2 0.95",
    "batch 4096, cosine 5e-3": full(4096, "5e-3", "cosine"),
    "batch 256, cosine 5e-3": full(256, "5e-3", "cosine"),
    "batch 256, cosine 1e-2": full(256, "1e-2", "cosine"),
    "batch 512, constant 1e-2": full(512, "1e-2"),
    "batch 256, constant 5e-3": BEST,
    "batch 256, constant 5e-3, Adam's epsilon 1e-4": BEST + " --adam_epsilon 1e-4",
    "batch 256, constant 5e-3, Adam's epsilon 1e-3": BEST + " --adam_epsilon 1e-3",
    "batch 256, constant 1e-2": full(256, "1e-2"),
    "batch 256, constant 2e-2": full(256, "2e-2"),
    "batch 128, constant 5e-3": full(128, "5e-3"),
    "batch 64, cosine 5e-3": full(64, "5e-3", "cosine"),
    "not private, batch 1024, cosine 5e-3": full(1024, "5e-3", "cosine", epsilon=None),
    "not private, batch 64, cosine 5e-3": full(64, "5e-3", "cosine", epsilon=None),
    "not private, batch 256, cosine 5e-3": full(256, "5e-3", "cosine", epsilon=None),
}


def lora(rate: str, rank: int, everywhere: bool, epsilon: float | None = 8) -> str:
    layers = "--lora_target_modules c_attn c_proj c_fc" if everywhere else ""
    scale = f"--enable_lora --lora_dim {rank} --lora_alpha {rank}"
    return f"{batch(256)} --learning_rate {rate} {CONSTANT} {private(epsilon)} {scale} {layers}".strip()


LORA_ROWS = {
    "attention's c_attn (peft's choice), rank 8, 1e-2": lora("1e-2", 8, False),
    "c_attn, rank 8, 3e-2": lora("3e-2", 8, False),
    "c_attn, rank 32, 1e-2": lora("1e-2", 32, False),
    "all linear layers, rank 2, 1e-2": lora("1e-2", 2, True),
    "all linear layers, rank 8, 1e-2": lora("1e-2", 8, True),
    "all linear layers, rank 32, 1e-2": lora("1e-2", 32, True),
    "not private, c_attn, rank 8, 3e-2": lora("3e-2", 8, False, None),
    "not private, all linear layers, rank 32, 1e-2": lora("1e-2", 32, True, None),
}


def plays(file: Path, steps: int, authors: int, rate: str, epsilon: float | None, more: str = "") -> str:
    """Options of a run on few authors; an expected batch above their number means all of them."""
    data = f"--train_file {file} --eval_fraction 0.1 --long_samples split {CONSTANT} {more}".strip()
    batch = f"--per_device_train_batch_size {min(authors, 64)} --gradient_accumulation_steps {max(1, authors // 64)}"
    return f"{data} {batch} --max_steps {steps} --learning_rate {rate} {private(epsilon)}"


def plays_rows(file: Path) -> tuple[dict, dict]:
    """Return the runs of both tables: epsilon, and the recipe at epsilon 8, of as many samples each (but where it says so)."""
    epsilons = {
        (name, epsilon): plays(file, 60, 320, rate, epsilon, more)
        for epsilon in (1, 2, 4, 8, None)
        for name, rate, more in (("full", "5e-3", ""), ("LoRA", "3e-2", "--enable_lora"))
    }
    recipe = {
        "batch 32, 520 steps, constant 1e-4": plays(file, 520, 32, "1e-4", 8),
        "batch 32, 520 steps, constant 5e-3": plays(file, 520, 32, "5e-3", 8),
        "batch 128, 130 steps, constant 5e-3": plays(file, 130, 128, "5e-3", 8),
        "all, 60 steps, constant 5e-3": plays(file, 60, 320, "5e-3", 8),
        "all, 60 steps, constant 1e-2": plays(file, 60, 320, "1e-2", 8),
        "all, 20 steps, three samples of each, constant 5e-3": plays(file, 20, 320, "5e-3", 8, "--samples_per_author 3"),
        "all, 60 steps, three samples of each (three times as many), constant 5e-3": plays(
            file, 60, 320, "5e-3", 8, "--samples_per_author 3"
        ),
        "all, 200 steps (three times as many), constant 5e-3": plays(file, 200, 320, "5e-3", 8),
        "not private, all, 60 steps, constant 5e-3": plays(file, 60, 320, "5e-3", None),
        "not private, all, 200 steps (three times as many), constant 5e-3": plays(file, 200, 320, "5e-3", None),
    }
    return epsilons, recipe


def run(options: str) -> float:
    """Run the script once; return the evaluation loss at the end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / "fine-tune-dp.py"), *f"{DATA} {QUIET} {options}".split()]
        done = subprocess.run([*command, "--output_dir", f"{folder}/out"], capture_output=True, text=True, env=environment)
        found = re.search(r"'eval_loss': '?([\d.]+)[^{]*\Z", done.stdout)
        assert done.returncode == 0 and found, done.stderr
        return float(found[1])


def measure(runs: dict, repetitions: int, parallel: int, cache: Path) -> dict:
    """Return for each row its evaluation losses."""
    losses: dict = {}
    for line in cache.read_text(encoding="utf-8").splitlines() if cache.exists() else []:
        options, loss = json.loads(line)
        losses.setdefault(options, []).append(loss)
    missing = [o for _ in range(repetitions) for o in runs.values()]
    for options in [o for o, known in losses.items() for _ in known]:
        if options in missing:
            missing.remove(options)
    with ThreadPoolExecutor(parallel) as pool, open(cache, "a", encoding="utf-8") as file:
        for options, loss in zip(missing, pool.map(run, missing)):
            losses.setdefault(options, []).append(loss)
            file.write(json.dumps([options, loss]) + "\n")
            file.flush()
    return {row: losses[options][:repetitions] for row, options in runs.items()}


def mean_and_spread(losses: list[float]) -> str:
    return f"{statistics.mean(losses):.3f} ± {statistics.stdev(losses) if len(losses) > 1 else 0:.3f}"


def epsilon_table(losses: dict, title: str, picture: str, legend: float) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    print("\n| epsilon | full | LoRA |\n|---|---|---|")
    for epsilon in (1, 2, 4, 8, None):
        row = [mean_and_spread(losses[name, epsilon]) for name in ("full", "LoRA")]
        print(f"| {epsilon or 'infinite (not private)'} | {' | '.join(row)} |")
    figure, axes = pyplot.subplots(figsize=(6, 3.6), layout="constrained")
    for name, colour in (("full", "#1b6ca8"), ("LoRA", "#c8553d")):
        means = [statistics.mean(losses[name, epsilon]) for epsilon in (1, 2, 4, 8)]
        spreads = [statistics.stdev(losses[name, epsilon]) if len(losses[name, epsilon]) > 1 else 0 for epsilon in (1, 2, 4, 8)]
        axes.errorbar((1, 2, 4, 8), means, spreads, marker="o", capsize=3, color=colour, label=name)
        axes.axhline(statistics.mean(losses[name, None]), color=colour, linestyle=":", label=f"{name}, not private")
    axes.set(xscale="log", xlabel="epsilon (author level)", ylabel="evaluation loss", title=title)
    axes.set_xticks((1, 2, 4, 8), ("1", "2", "4", "8"), minor=False)
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center right", bbox_to_anchor=(1, legend))
    figure.savefig(Path(__file__).with_name(picture), dpi=150)


def recipe_table(losses: dict) -> None:
    names = list(RECIPE)
    original = statistics.mean(losses[names[0]])
    free = min(statistics.mean(losses[name]) for name in names if name.startswith("not private"))
    print("\n| at epsilon 8 | evaluation loss | closes, of the gap to the best without privacy |\n|---|---|---|")
    for name in names:
        closed = (original - statistics.mean(losses[name])) / (original - free)
        print(f"| {name} | {mean_and_spread(losses[name])} | {closed:.0%} |")


def plain_table(losses: dict) -> None:
    print("\n| at epsilon 8 | evaluation loss |\n|---|---|")
    for name, values in losses.items():
        print(f"| {name} | {mean_and_spread(values)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["epsilon", "recipe", "lora"])
    parser.add_argument("--plays", type=Path, metavar="FILE", help="the two tables of few authors instead")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--parallel", type=int, default=2, help="runs at once, of one thread each")
    parser.add_argument("--cache", type=Path, default=Path("results.jsonl"))
    args = parser.parse_args()
    tables = {
        "epsilon": (EPSILON, functools.partial(epsilon_table, title=DEMO, picture="epsilon.png", legend=0.63)),
        "recipe": (RECIPE, recipe_table),
        "lora": (LORA_ROWS, plain_table),
    }
    if args.plays:
        epsilons, recipe = plays_rows(args.plays)
        figure = {"title": "The plays' few authors, 60 steps of all", "picture": "plays.png", "legend": 0.5}
        tables = {"epsilon": (epsilons, functools.partial(epsilon_table, **figure)), "recipe": (recipe, plain_table)}
    for name, (runs, table) in tables.items():
        if args.only in (None, name):
            table(measure(runs, args.repetitions, args.parallel, args.cache))


if __name__ == "__main__":
    main()
