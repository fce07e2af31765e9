"""What do epsilon, settings, correlated noise, averages and synthetic text do to the evaluation loss of held-out authors?

python benchmarks/quality.py results [--only epsilon|recipe|lora] [--repetitions 3] [--parallel 2] [--cache results.jsonl]
python benchmarks/quality.py results --plays FILE   # few authors: any file of author and content; here the roles of plays
python benchmarks/quality.py noise_bands [--only epsilon-8|uncorrected|sgd|epsilons|sampling] [--plays FILE] [--cache bands.jsonl]
python benchmarks/quality.py averaging --model_name demo/model ... --output_dir FOLDER     # the options of fine-tune-dp.py
python benchmarks/quality.py synthetic_utility synthetic.jsonl comments.jsonl --model_name gpt2 --sequence_len 128
"""

import argparse
import importlib.util
import math
import random
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from common import ROOT, cache_option, cached, drawing, fine_tune, main, option, parallel_option, print_head, print_row, table
from corpora import write_rows
from transformers import TrainerCallback

from author_dp.outputs.privacy_statement import check_statement
from author_dp.outputs.synthetic_report import (
    add_synthetic_report_options,
    read_real,
    read_synthetic,
    split_synthetic_texts,
    with_default_synthetic_columns,
)
from dp_utils import DPTrainer

# --- epsilon, recipe, LoRA, few authors -----------------------------------------------------------------------

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
    return fine_tune(*f"{DATA} {QUIET} {options}".split(), threads=1)["after"]["eval_loss"]


def measure(runs: dict, args: argparse.Namespace) -> dict:
    """Return for each row its evaluation losses."""
    distinct = list(dict.fromkeys(runs.values()))
    losses: dict[str, list[float]] = {options: [] for options in distinct}
    keys = distinct * args.repetitions
    for options, loss in zip(keys, cached(args.cache, keys, run, args.parallel)):
        losses[options].append(loss)
    return {row: losses[options] for row, options in runs.items()}


def repetitions_option(default: int):
    return option("--repetitions", type=int, default=default, help="runs of each row")


def spread(losses: list[float]) -> float:
    return statistics.stdev(losses) if len(losses) > 1 else 0.0


def mean_and_spread(losses: list[float]) -> str:
    return f"{statistics.mean(losses):.3f} ± {spread(losses):.3f}"


def epsilon_table(losses: dict, title: str, picture: str, legend: float) -> None:
    print()
    print_head("epsilon", "full", "LoRA")
    for epsilon in (1, 2, 4, 8, None):
        print_row(epsilon or "infinite (not private)", *(mean_and_spread(losses[name, epsilon]) for name in ("full", "LoRA")))
    with drawing(picture, figsize=(6, 3.6)) as (_, axes):
        for name, color in (("full", "#1b6ca8"), ("LoRA", "#c8553d")):
            private = [losses[name, epsilon] for epsilon in (1, 2, 4, 8)]
            style = {"marker": "o", "capsize": 3, "color": color, "label": name}
            axes.errorbar((1, 2, 4, 8), list(map(statistics.mean, private)), list(map(spread, private)), **style)
            axes.axhline(statistics.mean(losses[name, None]), color=color, linestyle=":", label=f"{name}, not private")
        axes.set(xscale="log", xlabel="epsilon (author level)", ylabel="evaluation loss", title=title)
        axes.set_xticks((1, 2, 4, 8), ("1", "2", "4", "8"), minor=False)
        axes.minorticks_off()
        axes.legend(frameon=False, loc="center right", bbox_to_anchor=(1, legend))


def recipe_table(losses: dict) -> None:
    names = list(RECIPE)
    original = statistics.mean(losses[names[0]])
    free = min(statistics.mean(losses[name]) for name in names if name.startswith("not private"))
    print()
    print_head("at epsilon 8", "evaluation loss", "closes, of the gap to the best without privacy")
    for name in names:
        closed = (original - statistics.mean(losses[name])) / (original - free)
        print_row(name, mean_and_spread(losses[name]), f"{closed:.0%}")


def plain_table(losses: dict) -> None:
    print()
    print_head("at epsilon 8", "evaluation loss")
    for name, values in losses.items():
        print_row(name, mean_and_spread(values))


@table(
    option("--only", choices=["epsilon", "recipe", "lora"]),
    option("--plays", type=Path, metavar="FILE", help="the two tables of few authors instead"),
    repetitions_option(3),
    parallel_option(2),
    cache_option("results.jsonl"),
)
def results(args: argparse.Namespace) -> None:
    """What epsilon, LoRA, batch, schedule, samples per author and clip norm do to the evaluation loss.

    Prints the tables of docs/results.md: epsilon, recipe, LoRA, few authors. Every run is the script itself with the demo's
    model, on its corpus or on FILE, in a folder of its own. Writes epsilon.png and plays.png beside this file.
    """
    figure: dict = {"title": DEMO, "picture": "epsilon.png", "legend": 0.63}
    tables = {"epsilon": (EPSILON, None), "recipe": (RECIPE, recipe_table), "lora": (LORA_ROWS, plain_table)}
    if args.plays:
        epsilons, recipe = plays_rows(args.plays)
        figure = {"title": "The plays' few authors, 60 steps of all", "picture": "plays.png", "legend": 0.5}
        tables = {"epsilon": (epsilons, None), "recipe": (recipe, plain_table)}
    for name, (runs, show) in tables.items():
        if args.only in (None, name):
            losses = measure(runs, args)
            show(losses) if show else epsilon_table(losses, **figure)


# --- noise bands ----------------------------------------------------------------------------------------------


def band_options(epsilon: float | None, bands: str, rate: str, more: str = "") -> str:
    promise = "--disable_dp" if epsilon is None else f"--target_epsilon {epsilon} --noise_bands {bands}"
    batch = "--per_device_train_batch_size 64 --gradient_accumulation_steps 4 --num_train_epochs 2"
    return f"{batch} --learning_rate {rate} --lr_scheduler_type constant {promise}{more}"


SGD = " --optim sgd --optim_args momentum=0.9"
PLAIN_ADAM = " --adam_noise_correction False"
GRIDS = {
    "epsilon-8": {
        **{("1", rate): band_options(8, "1", rate) for rate in ("5e-3", "1e-2", "2e-2")},
        **{(bands, "1e-2"): band_options(8, bands, "1e-2") for bands in ("2", "4", "8", "16", "auto")},
        **{("8", rate): band_options(8, "8", rate) for rate in ("5e-3", "2e-2")},
        ("not private", "1e-2"): band_options(None, "1", "1e-2"),
    },
    "uncorrected": {
        **{(bands, "1e-2"): band_options(8, bands, "1e-2", PLAIN_ADAM) for bands in ("2", "4", "8")},
        **{(bands, "2e-2"): band_options(8, bands, "2e-2", PLAIN_ADAM) for bands in ("2", "4", "8", "16")},
        **{("8", rate): band_options(8, "8", rate, PLAIN_ADAM) for rate in ("5e-3", "4e-2")},
    },
    "sgd": {(bands, rate): band_options(8, bands, rate, SGD) for rate in ("0.3", "1", "3") for bands in ("1", "8")},
    "epsilons": {
        (f"epsilon {epsilon}, b = {bands}", "1e-2"): band_options(epsilon, bands, "1e-2")
        for epsilon in (4, 2, 1)
        for bands in ("1", "8" if epsilon > 1 else "4")
    },
    "sampling": {
        (f"epsilon {epsilon}, auto, {sampling}", "1e-2"): band_options(epsilon, "auto", "1e-2", f" --sampling {sampling}")
        for epsilon in (8, 2, 1)
        for sampling in ("poisson", "balls-in-bins")
    },
}


def plays_grid(file: Path) -> dict:
    return {
        (bands, rate): plays(file, 520, 32, rate, 8, f"--noise_bands {bands}")
        for rate in ("5e-3", "1e-2")
        for bands in ("1", "8")
    }


@table(
    option("--only", choices=list(GRIDS)),
    option("--plays", type=Path, metavar="FILE", help="of author and content, few authors, instead of the demo's corpus"),
    repetitions_option(1),
    parallel_option(),
    cache_option("bands.jsonl"),
)
def noise_bands(args: argparse.Namespace) -> None:
    """What correlated noise (--noise_bands) brings: evaluation losses, measured.

    Every run is the script itself on the demo's corpus: expected batch 256 authors, 154 steps, a constant rate; those of
    "uncorrected" are by plain Adam. With --plays, runs on FILE, as those of `results`, expected batch 32, 520 steps, come
    instead.
    """
    for name, runs in ({"plays": plays_grid(args.plays)} if args.plays else GRIDS).items():
        if args.only in (None, name):
            losses = measure(runs, args)
            rates = list(dict.fromkeys(rate for _, rate in runs))
            print()
            print_head(f"{name}: b", *(f"rate {rate}" for rate in rates))
            for row in dict.fromkeys(row for row, _ in runs):
                print_row(row, *(mean_and_spread(losses.get((row, rate), [math.nan])) for rate in rates))


# --- averages of the weights ----------------------------------------------------------------------------------

DECAYS = (0.8, 0.9, 0.95, 0.98, 0.99)
LAST = (0.1, 0.25, 0.5)  # shares of the steps


class Averages(TrainerCallback):
    """Average the trained weights after each step."""

    def __init__(self, model: torch.nn.Module):
        self.weights = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.kept: dict[str, list[torch.Tensor]] = {}

    def on_step_end(self, args, state, control, **kwargs):
        step, steps = state.global_step, state.max_steps
        for decay in DECAYS:
            self.add(f"moving, {decay}", 1 - min(decay, (1 + step) / (10 + step)))
        for share in LAST:
            before = steps - max(1, int(steps * share))
            if step > before:
                self.add(f"last {share:.0%} of the steps", 1 / (step - before))

    def add(self, name: str, share: float) -> None:
        kept = self.kept.setdefault(name, [weight.detach().clone() for weight in self.weights])
        for average, weight in zip(kept, self.weights):
            average.lerp_(weight.detach(), share)

    def load(self, values: list[torch.Tensor]) -> None:
        for weight, value in zip(self.weights, values):
            weight.data.copy_(value)


class AveragingTrainer(DPTrainer):
    def train(self, *args, **kwargs):
        averages = Averages(self.model)
        self.add_callback(averages)
        result = super().train(*args, **kwargs)
        last = [weight.detach().clone() for weight in averages.weights]
        print()
        print_head("weights", "evaluation loss")
        for name, values in {"the last": last, **averages.kept}.items():
            averages.load(values)
            print_row(name, f"{self.evaluate()['eval_loss']:.3f}")
        averages.load(last)
        return result


@table(passes_on=True)
def averaging(args: argparse.Namespace) -> None:
    """Whether an average of the weights is better than the last ones: free of privacy cost (post-processing), but is it of use?

    One run of the script, with its options; at its end the evaluation loss of the last weights, of exponential moving averages
    (decay d, and (1 + t) / (10 + t) in the first steps t, where that is less), and of uniform averages over the last steps.
    """
    spec = importlib.util.spec_from_file_location("script", ROOT / "fine-tune-dp.py")
    script = importlib.util.module_from_spec(spec)
    sys.modules["script"] = script  # dataclasses look themselves up there
    spec.loader.exec_module(script)
    script.DPTrainer = AveragingTrainer
    sys.argv = ["fine-tune-dp.py", *args.rest]
    script.main()


# --- synthetic text -------------------------------------------------------------------------------------------

OPTIONS = ["--disable_dp", "--save_strategy", "no", "--log_level", "warning", "--disable_tqdm", "True"]


@table(
    option("synthetic", type=Path, help="a file that author_dp.generate wrote"),
    option("files", nargs="+", help="the --train_file of the training"),
    option("--text_column", help="of the real text; default: that of the training"),
    option("--messages_column"),
    option("--synthetic_column", help="of the synthetic text; default: the one that was generated"),
    add_synthetic_report_options,
    passes_on=True,
)
def synthetic_utility(args: argparse.Namespace) -> None:
    """What a model learns from synthetic text and from as much real text, by its evaluation loss on held-out authors.

    The files are those of author_dp.synthetic_report, and so are the options that describe them. All other options are passed to
    fine-tune-dp.py, which trains twice without privacy (--disable_dp), from the same model, with the same number of texts and
    steps. The held-out authors are those of the training. All results are computed on private data: do not publish them.
    """
    statement = check_statement(args.synthetic)
    args = with_default_synthetic_columns(args, statement)
    training, held_out = split_synthetic_texts(read_real("FILE", args.files, args), statement.get("model") or {}, args)
    texts = {"synthetic": read_synthetic(args.synthetic, args.synthetic_column), "real": [row.text for row in training]}
    number = min(map(len, texts.values()))
    metrics = {}
    with tempfile.TemporaryDirectory() as folder:
        held_out_file = write_rows(Path(folder) / "held_out.jsonl", [(f"held out: {row.author}", row.text) for row in held_out])
        for name, rows in texts.items():
            sample = random.Random(0).sample(rows, number)
            # Synthetic texts have no author: each text counts as one, on both sides.
            train_file = write_rows(Path(folder) / f"{name}.jsonl", [(f"text {i}", text) for i, text in enumerate(sample)])
            files = ["--train_file", str(train_file), "--validation_file", str(held_out_file)]
            metrics[name] = fine_tune(*files, *OPTIONS, *args.rest)
    print(f"PRIVATE, do not publish. Held-out authors; models trained on {number:,} texts each\n")
    print_head("trained on", "loss", "perplexity")
    for name, found in (("nothing", metrics["real"]["before"]), *((name, metrics[name]["after"]) for name in texts)):
        print_row(name, f"{found['eval_loss']:.3f}", f"{found['eval_perplexity']:,.1f}")


if __name__ == "__main__":
    main(__doc__, results, noise_bands, averaging, synthetic_utility)
