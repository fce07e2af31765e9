"""Which setting is best at a given epsilon and time: measure grids of settings, and fit the planner's formula to them.

python benchmarks/planner.py sweep --plays shakespeare.jsonl --roles roles.jsonl.gz --commits commits.jsonl.gz
python benchmarks/planner.py fit
python benchmarks/planner.py other_model     # beside what was measured of SmolLM2-135M

A corpus is a file of author and content; that of the demo is in this repository.
"""

import argparse
import functools
import gzip
import itertools
import json
import math
import random
import secrets
import statistics
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import ROOT, cache_option, cached, main, option, print_head, print_row, table
from corpora import write_rows
from scipy.optimize import least_squares
from scipy.stats import spearmanr
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainingArguments
from transformers.utils import logging

from author_dp.accounting import loss_prediction
from author_dp.accounting.accountant import find_noise_multiplier
from author_dp.accounting.events import cyclic_event
from author_dp.accounting.plan import make_plan
from author_dp.clipping.ghost import GhostClipping
from author_dp.data.columns import get_column
from author_dp.data.splits import author_hashes
from author_dp.mechanism.adam_bc import AdamBC
from author_dp.mechanism.losses import author_losses
from author_dp.mechanism.microbatches import LogicalBatchDataset
from author_dp.mechanism.optimizer import AuthorDPOptimizer
from author_dp.training.base_trainer import PlainEngine
from author_dp.training.dataloading import make_sampler
from author_dp.training.evaluation import EvalBatches, evaluate
from data_utils import AuthorDataset, DataArguments, collate, group_by_author, load_author_datasets
from dp_utils import PrivacyArguments

# --- the sweep ------------------------------------------------------------------------------------------------

CACHE = str(Path(__file__).with_suffix(".jsonl"))
CORPORA = ("demo", "plays", "roles", "commits")
HELD_OUT = {"demo": 0.05, "plays": 0.2, "roles": 0.05, "commits": 0.2}  # fraction of the authors
SAMPLED, TOKENS = 1_024, 16  # authors per run: steps x batch; tokens of each
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
AT_ONCE = 128  # authors
TEXTS, CHARACTERS = 4, 100  # of each author, and of each text


class Setting(NamedTuple):
    """A run of the sweep. epsilon None: without privacy."""

    corpus: str
    epsilon: float | None
    batch: int
    steps: int
    rate: float
    bands: str


def settings(corpora: Sequence[str]) -> list[Setting]:
    """Return the grid of each corpus, in an order in which any beginning is a fair sample; two settings come three times."""
    batches = {corpus: (16, 64, 128 if corpus == "plays" else 256) for corpus in corpora}  # the plays have 251 authors
    grid = {
        (epsilon, bands): [
            Setting(corpus, epsilon, batch, SAMPLED // batch, rate, bands)
            for corpus in corpora
            for batch, rate in itertools.product(batches[corpus][: 2 if epsilon is None else 3], RATES)
        ]
        for epsilon, bands in ((8, "1"), (8, "auto"), (None, "1"), (2, "auto"), (2, "1"))
    }
    first, rest = ([one for part in parts for one in part] for parts in (list(grid.values())[:3], list(grid.values())[3:]))
    random.Random(0).shuffle(first)
    untrained = [Setting(corpus, None, 1, 0, 0.0, "1") for corpus in corpora]
    again = [Setting(corpus, 8, 64, SAMPLED // 64, 1e-2, "auto") for corpus in corpora] * 2
    return [*untrained, *first, *again, *rest]


def read_short(file: str) -> list[tuple[str, str]]:
    """Return (author, text) of the first texts of each author, and their beginnings: more is not used in so few steps."""
    opened: Any = gzip.open(file, "rt", encoding="utf-8") if file.endswith(".gz") else open(file, encoding="utf-8")
    kept, numbers = [], Counter()
    with opened:
        for row in map(json.loads, opened):
            numbers[row["author"]] += 1
            if numbers[row["author"]] <= TEXTS:
                kept.append((row["author"], row["content"][:CHARACTERS]))
    return kept


@functools.cache
def load_corpus(name: str, file: str) -> tuple[AuthorDataset, AuthorDataset]:
    """Return the training authors and the held-out ones."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo/model")
    with tempfile.TemporaryDirectory() as folder:
        short = write_rows(Path(folder) / "corpus.jsonl", read_short(file))
        data = DataArguments(train_file=[str(short)], sequence_len=TOKENS, eval_fraction=HELD_OUT[name], max_eval_samples=300)
        sides = load_author_datasets(data, TrainingArguments(folder, use_cpu=True, report_to=[]), tokenizer)
    authors = [get_column(side, "author") for side in sides]
    train, held_out = (AuthorDataset(side, *group_by_author(a), author_hashes(a)) for side, a in zip(sides, authors))
    return train, held_out


@functools.cache
def make_run(corpus: str, file: str, epsilon: float | None, batch: int, steps: int, bands: str) -> tuple[Any, TrainingArguments]:
    """Return the plan of a run, and its Trainer's arguments."""
    train, _ = load_corpus(corpus, file)
    privacy = PrivacyArguments(
        target_epsilon=epsilon, noise_bands=bands, per_sample_max_grad_norm=1.0, disable_dp=epsilon is None
    )
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(folder, use_cpu=True, report_to=[], max_steps=steps, per_device_train_batch_size=batch)
    return make_plan(privacy, args, train.offsets), args


def train_once(files: dict[str, str], key: list) -> dict[str, Any]:
    """Train the demo's model with one setting, by the mechanism alone; return the loss of held-out authors, and the noise."""
    setting, start = Setting(*key), time.process_time()
    file = files[setting.corpus]
    train, held_out = load_corpus(setting.corpus, file)
    plan, args = make_run(setting.corpus, file, setting.epsilon, setting.batch, max(1, setting.steps), setting.bands)
    torch.manual_seed(secrets.randbits(63))  # dropout
    model = AutoModelForCausalLM.from_pretrained(ROOT / "demo/model")
    if setting.steps:
        run(model, train, plan, args, setting.rate)
    loader = torch.utils.data.DataLoader(EvalBatches(held_out, AT_ONCE, collate), batch_size=None)
    return {
        "loss": evaluate(model, loader, lambda: None, "eval").metrics["eval_loss"], "noise_multiplier": plan.noise_multiplier,
        "bands": plan.noise_bands, "num_authors": plan.num_authors, "seconds": round(time.process_time() - start, 1),
        "date": date.today().isoformat(), "versions": {name: version(name) for name in ("torch", "transformers")},
    }  # fmt: skip


def run(model: Any, train: AuthorDataset, plan: Any, args: TrainingArguments, rate: float) -> None:
    """Take the steps of a plan, as `DPTrainer` does."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer: Any = torch.optim.AdamW(parameters, lr=rate, weight_decay=0.0)
    if plan.disable_dp:
        engine: Any = PlainEngine(model, plan.expected_batch_size)
    else:
        engine = GhostClipping(model, plan.clip_norm)
        optimizer = AuthorDPOptimizer(
            AdamBC(optimizer) if plan.noise_bands > 1 else optimizer, noise_multiplier=plan.noise_multiplier,
            clip_norm=plan.clip_norm, expected_batch_size=plan.expected_batch_size, before_release=lambda: None,
        )  # fmt: skip
        optimizer.start_training(plan.coefficients())
    sampler = make_sampler(train, plan, args, num_canaries=0)
    batches = LogicalBatchDataset(train, AT_ONCE, collate)
    for _ in range(plan.steps):
        batch = batches.__getitems__(sampler.sample_batch())
        model.train()
        optimizer.zero_grad()
        for microbatch in batch.microbatches:
            losses = author_losses(engine.module, microbatch)
            engine.backward(losses, microbatch["author"], microbatch["samples_each"])
        optimizer.batch_index = batch.batch_index
        optimizer.step()
    engine.close()


@table(
    option("--demo", default=str(ROOT / "demo/comments.jsonl")),
    *(option(f"--{name}", required=True, metavar="FILE", help="of author and content") for name in CORPORA[1:]),
    option("--only", nargs="+", choices=CORPORA, default=CORPORA),
    cache_option(CACHE),
)
def sweep(args: argparse.Namespace) -> None:
    """Train the demo's model with each setting of the grids, at epsilon 8 and 2 and without privacy; keep the losses."""
    logging.set_verbosity_error()
    files = {name: getattr(args, name) for name in args.only}
    for name, file in files.items():  # here, not in the pool: signals are for the main thread
        load_corpus(name, file)
    keys = [list(setting) for setting in settings(args.only)]
    for number, (key, row) in enumerate(zip(keys, cached(args.cache, keys, functools.partial(train_once, files))), 1):
        print(f"{number}/{len(keys)}", *key, f"{row['loss']:.3f}", row["seconds"], flush=True)


# --- the fit --------------------------------------------------------------------------------------------------


START = (1.0, 0.15, 0.2, 1.2, 20.0, 3.0, 0.5, 20.0, 1.5)  # of the fit
CEILING = 1.05  # of shares: the log of the distance to it is fitted, so that the best settings count most


class Run(NamedTuple):
    """A measured run, as the formula sees it, with its loss: the mean, where a setting was measured several times."""

    key: Setting
    setting: loss_prediction.PredictionSetting
    loss: float


def read_runs(path: Path) -> dict[str, tuple[float, list[Run]]]:
    """Return for each corpus the loss before training, and its runs."""
    losses, rows = defaultdict(list), {}
    for line in path.read_text(encoding="utf-8").splitlines():
        key, row = json.loads(line)
        losses[Setting(*key)].append(row["loss"])
        rows[Setting(*key)] = row
    runs: dict[str, list[Run]] = defaultdict(list)
    before = {key.corpus: statistics.mean(found) for key, found in losses.items() if not key.steps}
    for key, found in losses.items():
        if key.steps:
            noise, bands, size = rows[key]["noise_multiplier"], rows[key]["bands"], loss_prediction.MEASURED_PARAMETERS
            setting = loss_prediction.PredictionSetting(noise, key.batch, key.steps, bands, key.rate, size, size, is_lora=False)
            runs[key.corpus].append(Run(key, setting, statistics.mean(found)))
    complete = [corpus for corpus, found in runs.items() if any(run.key.epsilon is None for run in found)]
    return {corpus: (before[corpus], runs[corpus]) for corpus in complete}


def measured_shares(before: float, runs: list[Run]) -> np.ndarray:
    """Return the share of the best gain without privacy that each run has, (runs,)."""
    most = before - min(run.loss for run in runs if run.key.epsilon is None)
    return np.array([(before - run.loss) / most for run in runs])


def predicted_shares(runs: list[Run], constants: loss_prediction.PredictionConstants) -> np.ndarray:
    """Return the same, predicted."""
    gains = np.array([loss_prediction.predicted_gain(run.setting, constants) for run in runs])
    return gains / max(gain for gain, run in zip(gains, runs) if run.key.epsilon is None)


def fit_constants(corpora: dict[str, tuple[float, list[Run]]]) -> loss_prediction.PredictionConstants:
    """Return the constants with the least squares of stretched shares; each corpus has equal weight."""
    targets, start = {corpus: measured_shares(*found) for corpus, found in corpora.items()}, np.log(START)

    def residuals(logs: np.ndarray) -> np.ndarray:
        constants = loss_prediction.PredictionConstants(*np.exp(np.clip(logs, start - 3, start + 3)))
        differences = [
            (stretch(predicted_shares(runs, constants)) - stretch(targets[corpus])) / math.sqrt(len(runs))
            for corpus, (_, runs) in corpora.items()
        ]
        return np.concatenate([*differences, 0.03 * (logs - start)])  # constants that the data do not tell stay put

    starts = [start, start + 0.4 * np.random.default_rng(1).standard_normal(len(start))]
    fits = [least_squares(residuals, begin, loss="soft_l1", f_scale=0.1, max_nfev=40) for begin in starts]
    return loss_prediction.PredictionConstants(*np.exp(min(fits, key=lambda fit: fit.cost).x).tolist())


def stretch(shares: np.ndarray) -> np.ndarray:
    """Return -log of the distance to CEILING: differences between the best settings count more."""
    return -np.log(CEILING - np.minimum(shares, CEILING - 0.01))


def rank_correlation(runs: list[Run], shares: np.ndarray) -> float:
    return float(spearmanr(shares, [-run.loss for run in runs]).statistic)


def pick(runs: list[Run], shares: np.ndarray) -> float:
    """Return the loss of the run with the largest predicted share."""
    return runs[int(np.argmax(shares))].loss


def guide_loss(runs: list[Run]) -> float:
    """Return the loss of the guide's start: the largest batch up to 256, the demo's rate, bands auto; NaN if it was not run."""
    largest = max(run.key.batch for run in runs)
    if largest < 128:
        return math.nan
    of_guide = {run.key.bands: run.loss for run in runs if run.key.batch == largest and run.key.rate == 1e-2}
    return of_guide.get("auto", of_guide.get("1", math.nan))


@table(cache_option(CACHE))
def fit(args: argparse.Namespace) -> None:
    """Fit the planner's constants to all corpora, and to all but each one, which is then predicted: rank, regret, residuals."""
    corpora = read_runs(args.cache)
    print_head("left out", "epsilon", "settings", "spread", "rank correlation", "regret", "regret of the guide's start")
    residuals = []
    for corpus, (before, runs) in corpora.items():
        constants = fit_constants({name: found for name, found in corpora.items() if name != corpus})
        shares, targets = predicted_shares(runs, constants), measured_shares(before, runs)
        residuals += list((shares - targets)[[run.key.epsilon is not None for run in runs]])
        for epsilon in (8, 2):
            chosen = [index for index, run in enumerate(runs) if run.key.epsilon == epsilon]
            if chosen:
                grid, found = [runs[index] for index in chosen], shares[chosen]
                losses = [run.loss for run in grid]
                regrets = [loss - min(losses) for loss in (pick(grid, found), guide_loss(grid))]
                spread = f"{max(losses) - min(losses):.2f}"
                rank = f"{rank_correlation(grid, found):.2f}" if len(grid) > 5 else "too few"
                print_row(
                    corpus, epsilon, len(grid), spread, rank, *("not run" if math.isnan(r) else f"{r:.3f}" for r in regrets)
                )
    print(f"\nresiduals: 80 % within {np.quantile(np.abs(residuals), 0.8):.3f}, {len(residuals)} runs of left-out corpora")
    print(fit_constants(corpora))


# Runs of SmolLM2-135M (docs/results.md): kind, learning rate, epsilon, noise bands, measured share of the gain. LoRA is of rank 8
# in all linear layers. By corpus: authors, batch, steps, delta.
ROLES, COMMITS = ("roles", 10_284, 128, 40, 1 / 10_284), ("commits", 2_165, 128, 24, 1e-5)
PICK = ("commits, the planner's pick", 2_165, 16, 192, 1e-5)
SMOLLM2_RUNS = {
    ROLES: (
        ("full", 1e-4, 8, 1, 0.47), ("full", 1e-4, 8, 16, 0.55), ("full", 2e-4, 8, 16, 0.64), ("full", 2e-4, 4, 16, 0.61),
        ("full", 2e-4, 1, 16, 0.55), ("LoRA", 1e-3, 8, 16, 0.76), ("LoRA", 1e-3, 4, 16, 0.73), ("LoRA", 1e-3, 1, 16, 0.68),
        ("LoRA", 2e-3, 8, 16, 0.80),
    ),
    COMMITS: (("LoRA", 2e-3, 8, 8, 0.62), ("LoRA", 2e-3, 2, 2, 0.57), ("LoRA", 2e-3, 1, 1, 0.40)),
    PICK: (("LoRA", 2e-3, 8, 64, 0.68),),
}  # fmt: skip
SMOLLM2_SIZES = {"full": (134_515_008, 134_515_008), "LoRA": (134_515_008, 2_442_240)}  # parameters, of which trained


@table()
def other_model(args: argparse.Namespace) -> None:
    """What the formula predicts for another model, of which the fit knows nothing, beside what was measured."""
    print_head(
        "corpus", "kind", "learning rate", "epsilon", "noise bands", "noise multiplier", "predicted (interval)", "measured"
    )
    for (corpus, authors, batch, steps, delta), runs in SMOLLM2_RUNS.items():
        for kind, rate, epsilon, bands, measured in runs:
            event = cyclic_event(0.0, batch / authors, steps, bands)
            noise = find_noise_multiplier(event.sample_rate, event.steps, epsilon, delta)
            setting = loss_prediction.PredictionSetting(noise, batch, steps, bands, rate, *SMOLLM2_SIZES[kind], kind == "LoRA")
            share, low, high = loss_prediction.predicted_share(setting)
            predicted = f"{share:.0%} ({low:.0%} to {high:.0%})"
            print_row(corpus, kind, f"{rate:g}", epsilon, bands, f"{noise:.3f}", predicted, f"{measured:.0%}")


if __name__ == "__main__":
    main(__doc__, sweep, fit, other_model)
