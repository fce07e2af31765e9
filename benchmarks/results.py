"""What a user can choose: epsilon, full or LoRA, batch, schedule, samples per author, clip norm. Prints tables, draws a plot.

python benchmarks/results.py [--only epsilon|recipe] [--repetitions 3] [--parallel 2] [--cache results.jsonl]

Every run is the script itself on the demo's corpus and model, in a folder of its own; the evaluation loss is that of held-out
authors. Runs that are in the cache are not repeated. Writes epsilon.png beside this file.
"""

import argparse
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


CONSTANT = "--lr_scheduler_type constant"
EPSILON = {
    (name, epsilon): f"{batch(256)} {options} {private(epsilon)}"
    for epsilon in (1, 2, 4, 8, None)
    for name, options in (("full", FULL), ("LoRA", LORA))
}
# All of them process two epochs' worth of samples; the order of options is that of EPSILON, so that the cache serves both.
TWO = f"{batch(1024)} {FULL} {private(8)} --samples_per_author 2".replace("epochs 2", "epochs 1.5")
RECIPE = {
    "the original: batch 1024, constant 1e-4": f"{batch(1024)} --learning_rate 1e-4 {CONSTANT} {private(8)}",
    "batch 1024, constant 1e-3": f"{batch(1024)} --learning_rate 1e-3 {CONSTANT} {private(8)}",
    "batch 1024, constant 5e-3": f"{batch(1024)} --learning_rate 5e-3 {CONSTANT} {private(8)}",
    "batch 1024, cosine 5e-3": f"{batch(1024)} {FULL} {private(8)}",
    "batch 1024, cosine 1e-2": f"{batch(1024)} --learning_rate 1e-2 --lr_scheduler_type cosine {private(8)}",
    "batch 1024, cosine 5e-3, two samples per author": TWO,
    "batch 1024, cosine 5e-3, clip norm 0.1": f"{batch(1024)} {FULL} {private(8)} --per_sample_max_grad_norm 0.1",
    "batch 1024, cosine 5e-3, Adam's beta2 0.95": f"{batch(1024)} {FULL} {private(8)} --adam_beta2 0.95",
    "batch 4096, cosine 5e-3": f"{batch(4096)} {FULL} {private(8)}",
    "batch 256, cosine 5e-3": f"{batch(256)} {FULL} {private(8)}",
    "batch 256, cosine 1e-2": f"{batch(256)} --learning_rate 1e-2 --lr_scheduler_type cosine {private(8)}",
    "batch 256, constant 5e-3": f"{batch(256)} --learning_rate 5e-3 {CONSTANT} {private(8)}",
    "batch 64, cosine 5e-3": f"{batch(64)} {FULL} {private(8)}",
    "not private, batch 1024, cosine 5e-3": f"{batch(1024)} {FULL} {private(None)}",
    "not private, batch 64, cosine 5e-3": f"{batch(64)} {FULL} {private(None)}",
    "not private, batch 256, cosine 5e-3": f"{batch(256)} {FULL} {private(None)}",
}


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
    for line in cache.read_text().splitlines() if cache.exists() else []:
        options, loss = json.loads(line)
        losses.setdefault(options, []).append(loss)
    missing = [o for _ in range(repetitions) for o in runs.values()]
    for options in [o for o, known in losses.items() for _ in known]:
        if options in missing:
            missing.remove(options)
    with ThreadPoolExecutor(parallel) as pool, open(cache, "a") as file:
        for options, loss in zip(missing, pool.map(run, missing)):
            losses.setdefault(options, []).append(loss)
            file.write(json.dumps([options, loss]) + "\n")
            file.flush()
    return {row: losses[options][:repetitions] for row, options in runs.items()}


def mean_and_spread(losses: list[float]) -> str:
    return f"{statistics.mean(losses):.3f} ± {statistics.stdev(losses) if len(losses) > 1 else 0:.3f}"


def epsilon_table(losses: dict) -> None:
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
    axes.set(xscale="log", xlabel="epsilon (author level)", ylabel="evaluation loss", title="The demo's corpus, two epochs")
    axes.set_xticks((1, 2, 4, 8), ("1", "2", "4", "8"), minor=False)
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, loc="center right", bbox_to_anchor=(1, 0.63))
    figure.savefig(Path(__file__).with_name("epsilon.png"), dpi=150)


def recipe_table(losses: dict) -> None:
    names = list(RECIPE)
    original = statistics.mean(losses[names[0]])
    free = min(statistics.mean(losses[name]) for name in names if name.startswith("not private"))
    print("\n| at epsilon 8 | evaluation loss | closes, of the gap to the best without privacy |\n|---|---|---|")
    for name in names:
        closed = (original - statistics.mean(losses[name])) / (original - free)
        print(f"| {name} | {mean_and_spread(losses[name])} | {closed:.0%} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["epsilon", "recipe"])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--parallel", type=int, default=2, help="runs at once, of one thread each")
    parser.add_argument("--cache", type=Path, default=Path("results.jsonl"))
    args = parser.parse_args()
    for name, runs, table in (("epsilon", EPSILON, epsilon_table), ("recipe", RECIPE, recipe_table)):
        if args.only in (None, name):
            table(measure(runs, args.repetitions, args.parallel, args.cache))


if __name__ == "__main__":
    main()
