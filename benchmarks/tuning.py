"""Which way of choosing a setting ends at the lowest loss, if all that it spends on the authors counts?

    python benchmarks/tuning.py [--repetitions 3] [--search_repetitions 2] [--cache benchmarks/tuning.jsonl]

Runs in the cache are not measured again. Each row of the table has a total epsilon of 8 on the demo's data. What is chosen is the
learning rate, out of GRID.
"""

import argparse
import functools
import json
import math
import random
import statistics
import subprocess
import sys
import tempfile
from datetime import datetime, timezone
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Any

from common import ROOT, cache_option, cached, main, option, print_head, print_row, table
from datasets import disable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from author_dp.accounting.accountant import find_noise_multiplier
from author_dp.accounting.ledger import event_of_run
from author_dp.accounting.tuning import Release, RunCount, calibrate_search
from author_dp.data.splits import author_hashes
from author_dp.training.public_loss import GRID as STEPS_OF_LOSS
from author_dp.training.public_loss import discrete_laplace, noisy_mean
from data_utils import AuthorDataset, DataArguments, collate, group_by_author, load_author_datasets
from dp_utils import DPTrainer, PrivacyArguments

disable_progress_bars()
QUIET: dict[str, Any] = {
    "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no", "log_level": "error",
    "remove_unused_columns": False,
}  # fmt: skip
EPSILON, SCORE_EPSILON, EXPECTED_RUNS, SEARCHES = 8.0, 0.5, 6.0, 2_000
GRID = ("1e-3", "3e-3", "1e-2", "3e-2")  # learning rates
DEFAULT, QUICK_START = "1e-3", "1e-2"  # of docs/hyperparameters.md, and of README.md
MODEL, CORPUS, STEPS, BATCH = str(ROOT / "demo" / "model"), str(ROOT / "demo" / "comments.jsonl"), 40, 64
TEXTS = 1_500  # of synthetic text
LARGEST_LOSS = math.log(748)  # the default range of a released loss: of the demo's vocabulary


@functools.cache
def load(file: str, eval_fraction: float, is_generator: bool = False) -> tuple[AuthorDataset, AuthorDataset]:
    """Return the authors to train on, and those held out, of a file."""
    args = DataArguments(
        train_file=[file], eval_fraction=eval_fraction, sequence_len=64, prepend_bos=is_generator, append_eos=is_generator
    )
    parts = load_author_datasets(args, TrainingArguments("unused", **QUIET), AutoTokenizer.from_pretrained(MODEL))
    return tuple(AuthorDataset(part, *group_by_author(part["author"]), author_hashes(part["author"])) for part in parts)


def train(data: tuple[AuthorDataset, AuthorDataset], rate: str, folder: str, **privacy: Any) -> DPTrainer:
    """Return a trained trainer of the demo's model."""
    trainer = DPTrainer(
        AutoModelForCausalLM.from_pretrained(MODEL),
        TrainingArguments(
            folder, per_device_train_batch_size=BATCH, max_steps=STEPS, learning_rate=float(rate), lr_scheduler_type="constant",
            max_grad_norm=0.0, per_device_eval_batch_size=64, **QUIET,
        ),
        PrivacyArguments(per_sample_max_grad_norm=1.0, **privacy),
        train_dataset=data[0], eval_dataset=data[1], data_collator=collate, sequence_len=64,
        processing_class=AutoTokenizer.from_pretrained(MODEL),
    )  # fmt: skip
    trainer.rehearse = lambda: None  # only the losses count
    trainer.train()
    return trainer


def measure(rate: str, **privacy: Any) -> dict[str, Any]:
    """Return the losses of held-out authors after a run, its ledger's header, and when and with what it ran."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = train(load(CORPUS, 0.02), rate, folder, **privacy)
        after, header = trainer.evaluate(), trainer.budget.ledger.runs[0]
    return {
        "loss": after["eval_loss"],
        "author_loss": after["eval_author_loss"],
        "authors": after["eval_num_authors"],
        "header": {name: header[name] for name in ("noise_multiplier", "sample_rate", "steps", "noise_bands", "delta")},
        **provenance(),
    }


def tune_on_synthetic(sigma: float, bands: int) -> dict[str, Any]:
    """Return the loss of a first model on real text, and losses of runs on the text that it wrote, by rate: these are free.

    Args:
        sigma, bands: of the first model, and of the run on real text that will follow.
    """
    with tempfile.TemporaryDirectory() as folder:
        model, text, data = (Path(folder) / name for name in ("model", "text.jsonl", "data.jsonl"))
        first = train(
            load(CORPUS, 0.02, is_generator=True), DEFAULT, str(model), noise_multiplier=sigma, noise_bands=str(bands)
        )  # fmt: skip
        first.save_model()
        command = [sys.executable, "-m", "author_dp.generate", str(model), "--number", str(TEXTS), "--out", str(text)]
        subprocess.run([*command, "--text_column", "content", "--max_new_tokens", "32"], check=True, cwd=ROOT)
        rows = [json.loads(line) for line in text.read_text("utf-8").splitlines()]
        data.write_text("".join(json.dumps({**row, "author": f"{number}"}) + "\n" for number, row in enumerate(rows)), "utf-8")
        losses = {}
        for rate in GRID:  # of fewer authors, so larger samples: as many bands as fit
            privacy = {"noise_multiplier": sigma, "noise_bands": str(min(bands, 16))}
            losses[rate] = train(load(str(data), 0.2), rate, str(Path(folder) / rate), **privacy).evaluate()["eval_loss"]
        return {"first_loss": first.evaluate()["eval_loss"], "losses": losses, **provenance()}


def provenance() -> dict[str, Any]:
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


def simulate_searches(runs: dict[str, list[dict[str, Any]]], count: RunCount) -> list[float]:
    """Return the losses of the models that searches release, each of runs drawn from measured ones.

    Args:
        runs: measured with the noise of a search, by rate.
        count: of the number of runs.
    """
    generator, losses = random.Random(0), []
    for _ in range(SEARCHES):
        drawn = [generator.choice(runs[generator.choice(GRID)]) for _ in range(count.draw())]
        losses.append(min((noisy_score(run), run["loss"]) for run in drawn)[1])
    return losses


def noisy_score(run: dict[str, Any]) -> float:
    """Return what a run releases of its loss: with the noise of public_loss.py."""
    total, share = run["authors"] * STEPS_OF_LOSS, min(1.0, run["author_loss"] / LARGEST_LOSS)
    scale = Fraction(STEPS_OF_LOSS) / Fraction(SCORE_EPSILON)
    sums = [round(total * part) + discrete_laplace(scale) for part in (share, 1 - share)]
    return noisy_mean(sums, LARGEST_LOSS, float(scale))["loss"]


def print_losses(name: str, rate: str, sigma: float, losses: list[float]) -> None:
    cells = ", ".join(f"{loss:.2f}" for loss in losses)
    print_row(name, rate, f"{sigma:.3f}", cells, f"{statistics.mean(losses):.2f}")


@table(
    option("--repetitions", type=int, default=3, help="of each way"),
    option("--search_repetitions", type=int, default=2, help="of each setting with the noise of a search"),
    cache_option("benchmarks/tuning.jsonl"),
)
def choices(args: argparse.Namespace) -> None:
    """The loss that each way of choosing a learning rate ends at.

    40 steps, expected batch 64, noise bands auto. "Private tuning" is simulated: number of runs, their settings and the noise
    of the scores are drawn 2,000 times, and each run among those measured with the noise of a search, which the table has too.
    """

    def of(rate: str, repetitions: int = args.repetitions, **privacy: Any) -> list[dict[str, Any]]:
        keys = [[rate, privacy]] * repetitions
        return list(cached(args.cache, keys, lambda key: measure(key[0], **key[1])))

    alone = {"target_epsilon": EPSILON, "noise_bands": "auto"}
    print_head("chosen by", "rate", "noise multiplier", "loss of each run", "mean")
    for name, rate in (("the guide's default", DEFAULT), ("an earlier choice without privacy (README)", QUICK_START)):
        runs = of(rate, **alone)
        print_losses(name, rate, runs[0]["header"]["noise_multiplier"], [run["loss"] for run in runs])
    header = of(DEFAULT, **alone)[0]["header"]
    event, bands = event_of_run(header, header["steps"]), header["noise_bands"]

    pair = round(find_noise_multiplier(event.sample_rate, 2 * event.steps, EPSILON, header["delta"]), 6)
    (synthetic,) = cached(args.cache, [["synthetic text", pair, bands]], lambda key: tune_on_synthetic(*key[1:]))
    rate = min(GRID, key=synthetic["losses"].__getitem__)
    runs = of(rate, noise_multiplier=pair, noise_bands=str(bands))
    print_losses("synthetic text of a first model", rate, pair, [run["loss"] for run in runs])

    counts = [RunCount(EXPECTED_RUNS, eta) for eta in (0.0, 1.0)]
    noise = calibrate_search(counts, event.sample_rate, event.steps, EPSILON, header["delta"], Release(SCORE_EPSILON))
    privacy = {"target_epsilon": round(noise.run_epsilon, 6), "noise_bands": str(bands)}
    in_search = {rate: of(rate, args.search_repetitions, **privacy) for rate in GRID}
    for rate, runs in in_search.items():
        print_losses("(a run of the search)", rate, noise.noise_multiplier, [run["loss"] for run in runs])
    losses = sorted(simulate_searches(in_search, noise.run_count))
    low, high = losses[SEARCHES // 10], losses[-SEARCHES // 10]
    print_row(
        f"private tuning, {EXPECTED_RUNS:g} runs expected", f"one of {', '.join(GRID)}", f"{noise.noise_multiplier:.3f}",
        f"{low:.2f} to {high:.2f} in 8 of 10 searches", f"{statistics.mean(losses):.2f}",
    )  # fmt: skip
    print(f"\nloss on synthetic text, by rate: {synthetic['losses']}; the first model's loss: {synthetic['first_loss']:.2f}")


if __name__ == "__main__":
    main(__doc__, choices)
