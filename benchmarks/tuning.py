"""Which way of choosing a setting ends at the lowest loss, if all that it spends on the authors counts?

    python benchmarks/tuning.py [--repetitions 3] [--search_repetitions 2] [--cache benchmarks/tuning.jsonl]
    python benchmarks/tuning.py --study commits --model_name FOLDER --data commits.jsonl    # both: see real_model.py

Runs in the cache are not measured again. Each row of the table has a total epsilon of 8. What is chosen is the learning rate, out
of a grid; by the planner also batch, steps and noise bands, for as many authors sampled in all.
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
from typing import Any, NamedTuple, Optional

from common import ROOT, cache_option, cached, main, option, print_head, print_row, table
from datasets import disable_progress_bars
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainingArguments

from author_dp.accounting.accountant import find_noise_multiplier
from author_dp.accounting.ledger import ledger_event_of_run
from author_dp.accounting.loss_prediction import PredictionSetting
from author_dp.accounting.run_planning import PlanningTask, planning_candidates
from author_dp.accounting.tuning import RunCount, TuningRelease, calibrate_search
from author_dp.data.splits import author_hashes
from author_dp.models.sizes import model_sizes
from author_dp.training.loss_release import GRID as STEPS_OF_LOSS
from author_dp.training.loss_release import discrete_laplace, noisy_released_loss
from data_utils import AuthorDataset, DataArguments, collate, group_by_author, load_author_datasets
from dp_utils import DPTrainer, PrivacyArguments

disable_progress_bars()
QUIET: dict[str, Any] = {
    "use_cpu": True, "report_to": [], "save_strategy": "no", "disable_tqdm": True, "logging_strategy": "no", "log_level": "error",
    "remove_unused_columns": False,
}  # fmt: skip
EPSILON, SCORE_EPSILON, EXPECTED_RUNS, SEARCHES = 8.0, 0.5, 6.0, 2_000
DEFAULT, QUICK_START = "1e-3", "1e-2"  # an untuned start for LoRA, and the rate of README.md


class Study(NamedTuple):
    """A corpus, a model, and the size of a run."""

    name: str
    model: str
    corpus: str
    grid: tuple[str, ...]  # learning rates
    steps: int
    batch: int  # authors
    tokens: int
    texts: int  # of synthetic text
    held_out: int  # texts that are evaluated, at most
    eval_fraction: float
    is_lora: bool


class Size(NamedTuple):
    """Steps of a run, and expected authors of each."""

    steps: int
    batch: int


DEMO = Study("demo", str(ROOT / "demo" / "model"), str(ROOT / "demo" / "comments.jsonl"), ("1e-3", "3e-3", "1e-2", "3e-2"),
             steps=40, batch=64, tokens=64, texts=1_500, held_out=10**9, eval_fraction=0.02, is_lora=False)  # fmt: skip
COMMITS = Study("commits", "", "", ("5e-4", "1e-3", "2e-3", "4e-3"), steps=12, batch=64, tokens=16, texts=500, held_out=600,
                eval_fraction=0.1, is_lora=True)  # fmt: skip


@functools.cache
def load(study: Study, file: str, eval_fraction: float, is_generator: bool = False) -> tuple[AuthorDataset, AuthorDataset]:
    """Return the authors to train on, and those held out, of a file."""
    args = DataArguments(
        train_file=[file], eval_fraction=eval_fraction, sequence_len=study.tokens, max_eval_samples=study.held_out,
        prepend_bos=is_generator, append_eos=is_generator,
    )  # fmt: skip
    parts = load_author_datasets(args, TrainingArguments("unused", **QUIET), AutoTokenizer.from_pretrained(study.model))
    return tuple(AuthorDataset(part, *group_by_author(part["author"]), author_hashes(part["author"])) for part in parts)


def make_model(study: Study) -> Any:
    """Return the model, with adapters as in user_level.py where the study has them."""
    model = AutoModelForCausalLM.from_pretrained(study.model)
    if study.is_lora:
        model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=8, lora_alpha=16, target_modules="all-linear"))
    return model


def train(
    study: Study, size: Size, data: tuple[AuthorDataset, AuthorDataset], rate: str, folder: str, **privacy: Any
) -> DPTrainer:
    """Return a trained trainer."""
    at_once = min(size.batch, 16 if study.is_lora else 64)
    trainer = DPTrainer(
        make_model(study),
        TrainingArguments(
            folder, per_device_train_batch_size=at_once, gradient_accumulation_steps=size.batch // at_once, max_steps=size.steps,
            learning_rate=float(rate), lr_scheduler_type="constant", bf16=study.is_lora, max_grad_norm=0.0,
            per_device_eval_batch_size=64, **QUIET,
        ),
        PrivacyArguments(per_sample_max_grad_norm=1.0, **privacy),
        train_dataset=data[0], eval_dataset=data[1], data_collator=collate, sequence_len=study.tokens,
        processing_class=AutoTokenizer.from_pretrained(study.model),
    )  # fmt: skip
    trainer.rehearse = lambda: None  # only the losses count
    trainer.train()
    return trainer


def measure(study: Study, size: Size, rate: str, **privacy: Any) -> dict[str, Any]:
    """Return the losses of held-out authors after a run, its ledger's header, and when and with what it ran."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = train(study, size, load(study, study.corpus, study.eval_fraction), rate, folder, **privacy)
        after, header = trainer.evaluate(), trainer.budget.ledger.runs[0]
    return {
        "loss": after["eval_loss"],
        "author_loss": after["eval_author_loss"],
        "authors": after["eval_num_authors"],
        "header": {name: header[name] for name in ("noise_multiplier", "sample_rate", "steps", "noise_bands", "delta")},
        **provenance(),
    }


def tune_on_synthetic(study: Study, sigma: float, bands: int) -> dict[str, Any]:
    """Return the loss of a first model on real text, and losses of runs on the text that it wrote, by rate: these are free.

    Args:
        sigma, bands: of the first model, and of the run on real text that will follow.
    """
    size = Size(study.steps, study.batch)
    with tempfile.TemporaryDirectory() as folder:
        model, text, data = (Path(folder) / name for name in ("model", "text.jsonl", "data.jsonl"))
        real = load(study, study.corpus, study.eval_fraction, is_generator=True)
        first = train(study, size, real, DEFAULT, str(model), noise_multiplier=sigma, noise_bands=str(bands))
        first.save_model()
        command = [sys.executable, "-m", "author_dp.generate", str(model), "--number", str(study.texts), "--out", str(text)]
        length = str(min(study.tokens, 32))
        subprocess.run([*command, "--text_column", "content", "--max_new_tokens", length], check=True, cwd=ROOT)
        rows = [json.loads(line) for line in text.read_text("utf-8").splitlines()]
        data.write_text("".join(json.dumps({**row, "author": f"{number}"}) + "\n" for number, row in enumerate(rows)), "utf-8")
        losses = {}
        for rate in study.grid:  # of fewer authors, so larger samples: as many bands as fit
            privacy = {
                "noise_multiplier": sigma,
                "noise_bands": str(min(bands, max(1, study.texts * 3 // (4 * study.batch)), 16)),
            }
            synthetic = load(study, str(data), 0.2)
            losses[rate] = train(study, size, synthetic, rate, str(Path(folder) / rate), **privacy).evaluate()["eval_loss"]
        return {"first_loss": first.evaluate()["eval_loss"], "losses": losses, **provenance()}


def provenance() -> dict[str, Any]:
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


def simulate_searches(study: Study, runs: dict[str, list[dict[str, Any]]], count: RunCount) -> list[float]:
    """Return the losses of the models that searches release, each of runs drawn from measured ones.

    Args:
        runs: measured with the noise of a search, by rate.
        count: of the number of runs.
    """
    generator, losses = random.Random(0), []
    largest = math.log(AutoConfig.from_pretrained(study.model).vocab_size)  # the default range of a released loss
    for _ in range(SEARCHES):
        drawn = [generator.choice(runs[generator.choice(study.grid)]) for _ in range(count.draw())]
        losses.append(min((noisy_score(run, largest), run["loss"]) for run in drawn)[1])
    return losses


def noisy_score(run: dict[str, Any], largest: float) -> float:
    """Return what a run releases of its loss, of at most `largest`: with the noise of loss_release.py."""
    total, share = run["authors"] * STEPS_OF_LOSS, min(1.0, run["author_loss"] / largest)
    scale = Fraction(STEPS_OF_LOSS) / Fraction(SCORE_EPSILON)
    sums = [round(total * part) + discrete_laplace(scale) for part in (share, 1 - share)]
    return noisy_released_loss(sums, largest, float(scale))["loss"]


def print_losses(name: str, rate: str, sigma: float, losses: list[float]) -> None:
    cells = ", ".join(f"{loss:.2f}" for loss in losses)
    print_row(name, rate, f"{sigma:.3f}", cells, f"{statistics.mean(losses):.2f}")


def planned(study: Study, header: dict[str, Any]) -> PredictionSetting:
    """Return the planner's pick for as many authors sampled in all as a run of the study samples."""
    trained, parameters = model_sizes(make_model(study))
    authors = round(study.batch / header["sample_rate"])
    task = PlanningTask(authors, EPSILON, header["delta"], parameters, trained, study.is_lora, study.steps * study.batch)
    return planning_candidates(task)[0]


@table(
    option("--study", choices=("demo", "commits"), default="demo"),
    option("--model_name", help="of the commits: a folder"),
    option("--data", help="of the commits: JSON lines of author and content"),
    option("--repetitions", type=int, default=3, help="of each way"),
    option("--search_repetitions", type=int, default=2, help="of each setting with the noise of a search"),
    cache_option("benchmarks/tuning.jsonl"),
)
def choices(args: argparse.Namespace) -> None:
    """The loss that each way of choosing a learning rate ends at.

    The demo: 40 steps of 64 authors, all weights. The commits: 12 steps of 64 authors, LoRA, bfloat16. Noise bands auto. "Private
    tuning" is simulated: number of runs, their settings and the noise of the scores are drawn 2,000 times, and each run among
    those measured with the noise of a search, which the table has too.
    """
    study = DEMO if args.study == "demo" else COMMITS._replace(model=args.model_name, corpus=args.data)
    named = [] if study.name == "demo" else [study.name]

    def of(rate: str, repetitions: int = args.repetitions, size: Optional[Size] = None, **privacy: Any) -> list[dict[str, Any]]:
        keys = [[*named, rate, privacy, *([size] if size else [])]] * repetitions
        return list(cached(args.cache, keys, lambda _: measure(study, size or Size(study.steps, study.batch), rate, **privacy)))

    alone = {"target_epsilon": EPSILON, "noise_bands": "auto"}
    print_head("chosen by", "rate", "noise multiplier", "loss of each run", "mean")
    for name, rate in (("an untuned start", DEFAULT), ("an earlier choice without privacy (README)", QUICK_START)):
        if rate in study.grid:
            runs = of(rate, **alone)
            print_losses(name, rate, runs[0]["header"]["noise_multiplier"], [run["loss"] for run in runs])
    header = of(DEFAULT, **alone)[0]["header"]
    event, bands = ledger_event_of_run(header, header["steps"]), header["noise_bands"]

    pick = planned(study, header)
    size, bands_of_pick = Size(pick.steps, pick.batch), {"target_epsilon": EPSILON, "noise_bands": str(pick.bands)}
    runs = of(f"{pick.learning_rate:g}", size=size, **bands_of_pick)
    name = f"the planner: {pick.steps} steps of {pick.batch}, {pick.bands} bands"
    print_losses(name, f"{pick.learning_rate:g}", runs[0]["header"]["noise_multiplier"], [run["loss"] for run in runs])

    pair = round(find_noise_multiplier(event.sample_rate, 2 * event.steps, EPSILON, header["delta"]), 6)
    (synthetic,) = cached(args.cache, [[*named, "synthetic text", pair, bands]], lambda _: tune_on_synthetic(study, pair, bands))
    rate = min(study.grid, key=synthetic["losses"].__getitem__)
    runs = of(rate, noise_multiplier=pair, noise_bands=str(bands))
    print_losses("synthetic text of a first model", rate, pair, [run["loss"] for run in runs])

    counts = [RunCount(EXPECTED_RUNS, eta) for eta in (0.0, 1.0)]
    noise = calibrate_search(counts, event.sample_rate, event.steps, EPSILON, header["delta"], TuningRelease(SCORE_EPSILON))
    privacy = {"target_epsilon": round(noise.run_epsilon, 6), "noise_bands": str(bands)}
    in_search = {rate: of(rate, args.search_repetitions, **privacy) for rate in study.grid}
    for rate, runs in in_search.items():
        print_losses("(a run of the search)", rate, noise.noise_multiplier, [run["loss"] for run in runs])
    losses = sorted(simulate_searches(study, in_search, noise.run_count))
    low, high = losses[SEARCHES // 10], losses[-SEARCHES // 10]
    print_row(
        f"private tuning, {EXPECTED_RUNS:g} runs expected", f"one of {', '.join(study.grid)}", f"{noise.noise_multiplier:.3f}",
        f"{low:.2f} to {high:.2f} in 8 of 10 searches", f"{statistics.mean(losses):.2f}",
    )  # fmt: skip
    print(f"\nloss on synthetic text, by rate: {synthetic['losses']}; the first model's loss: {synthetic['first_loss']:.2f}")


if __name__ == "__main__":
    main(__doc__, choices)
