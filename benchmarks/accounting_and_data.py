"""What do accounting and data take, and what do their numbers say? No network, no GPU.

python benchmarks/accounting_and_data.py speed           # at the size of the Reddit run
python benchmarks/accounting_and_data.py speed --large   # 10,000,000 samples of 5,000,000 authors
python benchmarks/accounting_and_data.py noise_bands     # the error that correlated noise saves, computed
python benchmarks/accounting_and_data.py sample_level [--samples 44649] [--authors 20000] [--batch 1024] [--epochs 2]
python benchmarks/accounting_and_data.py release_error
"""

import argparse
import json
import math
import tempfile
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import datasets
import numpy as np
from common import ROOT, main, option, print_head, print_row, process_peak, table, timed
from dp_accounting.pld.privacy_loss_distribution import from_mixture_gaussian_mechanism
from scipy import stats
from transformers import GPT2TokenizerFast

from author_dp.accounting.accountant import compute_epsilon, find_noise_multiplier
from author_dp.accounting.banded_mf import BAND_CHOICES, banded_step_noise_std, prefix_sum_rmse, toeplitz_coefficients
from author_dp.accounting.events import MechanismEvent, cyclic_event
from author_dp.accounting.ledger import PrivacyLedger
from author_dp.accounting.tuning import RunCount, TuningRelease, least_tuning_noise, run_rdp, search_epsilon
from author_dp.data.authors import suspicious_author_warnings
from author_dp.data.columns import ColumnSpec, get_column
from author_dp.data.loading import load_files
from author_dp.data.tokenization import tokenize
from author_dp.mechanism.microbatches import LogicalBatchDataset
from author_dp.mechanism.sampling import PoissonAuthorSampler
from author_dp.training.loss_release import GRID, discrete_laplace, noisy_released_loss, quantize_released_loss
from data_utils import AuthorDataset, collate, group_by_author, split_by_author

# --- speed ----------------------------------------------------------------------------------------------------

SAMPLES, AUTHORS, BATCH = 500_000, 304_279, 1_024
LARGE_SAMPLES, LARGE_AUTHORS = 10_000_000, 5_000_000
COLUMNS = ColumnSpec("--train_file", "content", "author")

Row = tuple[str, float, str]  # what, seconds, remark


def write_corpus(path: Path) -> None:
    """Every author once, the other samples by a heavy-tailed choice; about 100 words a sample."""
    generator = np.random.default_rng(0)
    authors = np.concatenate([np.arange(AUTHORS), generator.zipf(1.6, SAMPLES - AUTHORS) % AUTHORS])
    generator.shuffle(authors)
    texts = [json.loads(line)["content"] for line in open(ROOT / "demo" / "comments.jsonl", encoding="utf-8")]
    with open(path, "w", encoding="utf-8") as file:
        for start, author in zip(generator.integers(0, len(texts) - 9, SAMPLES), authors):
            file.write(json.dumps({"author": f"user_{author}", "content": " ".join(texts[start : start + 9])}) + "\n")


def write_large_corpus(path: Path) -> None:
    generator = np.random.default_rng(0)
    with open(path, "w", encoding="utf-8") as file:
        for start in range(0, LARGE_SAMPLES, 100_000):
            numbers = generator.integers(0, LARGE_AUTHORS, 100_000)
            file.writelines(
                f'{{"author": "user_{author}", "content": "sample {start + i} of this many, ten words or so"}}\n'
                for i, author in enumerate(numbers)
            )


def time_large(path: Path) -> list[Row]:
    """Load, look through, group and sample ten million samples of five million authors."""
    seconds, loaded = timed(lambda: load_files([str(path)], COLUMNS))
    rows = [(f"load {LARGE_SAMPLES:,} samples from JSONL", seconds, f"{LARGE_SAMPLES / seconds:,.0f} samples/s")]
    seconds, _ = timed(lambda: suspicious_author_warnings(loaded, "content", "author"))
    rows.append(("look for nobody's authors and texts of several", seconds, ""))
    seconds, (train, _) = timed(lambda: split_by_author(loaded.data.to_batches(), COLUMNS.schema, "author", 0.02, 0))
    rows.append(("hold out 2 % of the authors", seconds, f"{len(loaded) - len(train):,} samples"))
    seconds, (offsets, indices) = timed(lambda: group_by_author(get_column(train, "author")))
    rows.append((f"group by {len(offsets) - 1:,} authors", seconds, ""))
    for number, its_offsets in ((len(offsets) - 1, offsets), (10**8, np.broadcast_to(np.int64(0), 10**8 + 1))):
        sampler = PoissonAuthorSampler(its_offsets, indices, sample_rate=BATCH / number, samples_per_author=1, steps=1, key=1)
        rows.append((f"one Poisson draw over {number:,} authors", timed(sampler.sample_authors, 200)[0], ""))
    return rows


def time_data(path: Path) -> list[Row]:
    shared = ROOT.parent / "shared" / "data" / "gpt2-tokenizer"
    tokenizer = GPT2TokenizerFast.from_pretrained(shared if shared.exists() else ROOT / "demo" / "model")
    seconds, samples = timed(lambda: load_files([str(path)], COLUMNS))
    rows = [("load 500,000 samples from JSONL", seconds, f"{SAMPLES / seconds:,.0f} samples/s")]
    texts = samples.select(range(50_000))["content"][:]
    seconds, _ = timed(
        lambda: [tokenizer(texts[i : i + 1_000], truncation=True, max_length=128) for i in range(0, 50_000, 1_000)]
    )
    rows.append(("tokenizer alone, 50,000 samples", seconds, f"{50_000 / seconds:,.0f} samples/s"))
    seconds, tokens = timed(lambda: tokenize(samples, tokenizer, text_column="content", sequence_len=128))
    rows.append(("tokenize 500,000 samples", seconds, f"{SAMPLES / seconds:,.0f} samples/s"))
    authors = get_column(tokens, "author")
    seconds, (offsets, indices) = timed(lambda: group_by_author(authors), 5)
    rows.append((f"group by {len(offsets) - 1:,} authors", seconds, ""))
    sampler = PoissonAuthorSampler(offsets, indices, sample_rate=BATCH / AUTHORS, samples_per_author=1, steps=1, key=1)
    rows.append(("one Poisson draw over all authors", timed(sampler.sample_authors, 20)[0], ""))
    seconds, batch = timed(sampler.sample_batch, 20)
    rows.append(("the draw with its samples", seconds, f"{batch.batch_size:,} authors"))
    dataset = LogicalBatchDataset(AuthorDataset(tokens, offsets, indices), 64, collate)
    seconds, _ = timed(lambda: dataset.__getitems__(batch), 20)
    rows.append(("fetch and collate the draw", seconds, "microbatches of 64 authors"))
    ledger = PrivacyLedger(path.with_name("ledger.jsonl"))
    ledger.start_run({"noise_multiplier": 0.5, "sample_rate": BATCH / AUTHORS})
    rows.append(("one step's record in the ledger, on disk", timed(ledger.record_step, 200)[0], "fsync included"))
    return rows


def time_accounting() -> list[Row]:
    rate, steps, delta = BATCH / AUTHORS, 894, 1 / AUTHORS
    calibration, sigma = timed(lambda: find_noise_multiplier(rate, steps, 8.0, delta))
    seconds, epsilon = timed(lambda: compute_epsilon(sigma, rate, steps, delta), 5)
    return [
        ("calibrate the noise, epsilon 8, 894 steps", calibration, f"noise multiplier {sigma:.4f}"),
        ("epsilon of the run", seconds, f"epsilon {epsilon:.3f}"),
    ]


@table(option("--large", action="store_true"))
def speed(args: argparse.Namespace) -> None:
    """Speed of everything around the training step, at the size of the Reddit run.

    500,000 synthetic samples of 304,279 authors (heavy-tailed), GPT-2 sized vocabulary where ../shared/data has GPT-2's
    tokenizer, the demo's tokenizer otherwise.

    With --large, 10,000,000 samples of 5,000,000 authors, and one draw over 100,000,000 authors.
    """
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "comments.jsonl"
        (write_large_corpus if args.large else write_corpus)(path)
        before = process_peak()
        rows = time_large(path) if args.large else time_data(path) + time_accounting()
    peak = process_peak()
    print_head("what", "seconds", "")
    for name, seconds, remark in rows:
        print_row(name, f"{seconds:.4f}", remark)
    print(f"\nPeak memory {peak:.2f} GiB, of which {before:.2f} GiB before loading.")


# --- noise bands ----------------------------------------------------------------------------------------------

RUNS = {  # expected batch, authors, steps
    "the original example, 3 epochs": (1_024, 304_279, 894),
    "the demo, 2 epochs": (256, 19_589, 154),
    "10,000 authors, 120 steps of 256": (256, 10_000, 120),
}


@table()
def noise_bands(args: argparse.Namespace) -> None:
    """The error of prefix sums, and the noise of a step, of --noise_bands, over those of independent noise, at one epsilon."""
    print_head("run", "epsilon", *(f"b = {bands}" for bands in BAND_CHOICES[1:]))
    for name, (batch, authors, steps) in RUNS.items():
        for epsilon in (8, 2):
            rate, cells = batch / authors, []
            plain = find_noise_multiplier(rate, steps, epsilon, 1 / authors)
            for bands in BAND_CHOICES[1:]:
                if bands * rate > 1 or bands > steps:
                    cells.append("-")
                    continue
                accounted = cyclic_event(0, rate, steps, bands)
                sigma = find_noise_multiplier(accounted.sample_rate, accounted.steps, epsilon, 1 / authors)
                c = toeplitz_coefficients(bands, steps)
                error = sigma * prefix_sum_rmse(c, steps) / (plain * prefix_sum_rmse(np.ones(1), steps))
                cells.append(f"{error:.2f} ({sigma * banded_step_noise_std(c, steps) / plain:.1f})")
            print_row(name, epsilon, *cells)


# --- sample level ---------------------------------------------------------------------------------------------


def author_epsilon(sigma: float, rate: float, steps: int, samples: int, delta: float, cells: float = math.inf) -> float:
    """Epsilon of an author with so many samples, add or remove one author.

    Args:
        cells: of the grid, of 0.01 or wider, to which losses are rounded up: fewer are faster, and still a bound.
    """
    counts = range(min(samples, int(samples * rate + 10 * math.sqrt(samples * rate) + 10)) + 1)
    odds = stats.binom.pmf(counts, samples, rate)
    interval = max(1e-2, (counts[-1] / sigma) ** 2 / cells)
    loss = from_mixture_gaussian_mechanism(
        sigma, counts, [float(p) for p in odds / odds.sum()], value_discretization_interval=interval
    )
    return loss.self_compose(steps).get_epsilon_for_delta(delta)


@table(
    option("--samples", type=int, default=44_649),
    option("--authors", type=int, default=20_000),
    option("--batch", type=int, default=1_024),
    option("--epochs", type=float, default=2),
)
def sample_level(args: argparse.Namespace) -> None:
    """What a sample-level guarantee would promise an author: epsilon against the author's number of samples.

    A run whose privacy unit is the sample, at sample-level epsilon 8. All m samples of one author together: each step draws a
    binomial number of them, which moves the sum by as many clip norms; composed exactly by dp-accounting (mixture of Gaussians).
    """
    delta, rate = 1 / args.authors, args.batch / args.samples
    steps = math.ceil(args.epochs / rate)
    sigma = find_noise_multiplier(rate, steps, 8.0, delta)
    by_author = find_noise_multiplier(args.batch / args.authors, math.ceil(args.epochs * args.authors / args.batch), 8.0, delta)
    print(f"sample level: sample rate {rate:.4f}, {steps} steps, noise multiplier {sigma:.4f}, epsilon 8 at delta {delta:.2g}")
    print(f"author level at the same epsilon, batch and epochs: noise multiplier {by_author:.4f}\n")
    print_head("samples of the author", "epsilon that the sample-level run promises the author")
    for samples in (1, 2, 5, 10, 20, 50, 100):
        print_row(samples, f"{author_epsilon(sigma, rate, steps, samples, delta):.1f}")


# --- the released evaluation loss -----------------------------------------------------------------------------

RELEASES = 300


def error_of_release(authors: int, epsilon: float, upper: float) -> float:
    losses = np.random.default_rng(0).normal(3.6, 0.5, authors)
    sums = np.sum([quantize_released_loss(float(loss), upper) for loss in losses], axis=0).tolist()
    scale = Fraction(GRID) / Fraction(epsilon)
    found = [
        noisy_released_loss([total + discrete_laplace(scale) for total in sums], upper, GRID / epsilon)["loss"]
        for _ in range(RELEASES)
    ]
    return float(np.sqrt(np.mean((np.array(found) - losses.mean()) ** 2)))


@table()
def release_error(args: argparse.Namespace) -> None:
    """How far is a published evaluation loss from the true one?

    The noise of training/loss_release.py on losses of made-up held-out authors (normal, mean 3.6, standard deviation 0.5), as
    --release_eval_epsilon would release them with GPT-2's vocabulary: the root of the mean squared error over 300 releases.
    """
    largest = math.log(50_257)
    print_head("held-out authors", "epsilon", f"error, range {largest:.3g} (default)", "error, --release_eval_range 6")
    for authors, epsilon in ((100, 1.0), (1_000, 0.1), (1_000, 1.0), (10_000, 1.0)):
        errors = (f"{error_of_release(authors, epsilon, upper):.3g}" for upper in (largest, 6.0))
        print_row(f"{authors:,}", f"{epsilon:g}", *errors)


# --- a private search -----------------------------------------------------------------------------------------


@table()
def tuning(args: argparse.Namespace) -> None:
    """What a private search costs: its noise multiplier against that of a single run at the same epsilon.

    Computed for the demo of the README: 154 steps at sample rate 0.0131, delta 5.1e-5. Each run releases its evaluation loss,
    with 1/16 of the search's epsilon. "Alone" is the epsilon of one of its runs, if there were no search. "Same noise" is the
    epsilon of a search whose runs have the noise of a single run at the epsilon in front.
    """
    rate, steps, delta = 256 / 19_600, 154, 1 / 19_600
    heads = ("epsilon", "expected runs", "at most, 99 %", "law", "noise multiplier", "single run", "ratio", "alone", "Poisson")
    print_head(*heads, "same noise")
    for epsilon in (1.0, 8.0):
        single, release = find_noise_multiplier(rate, steps, epsilon, delta), TuningRelease(epsilon / 16)
        for expected in (2.0, 6.0, 20.0):
            counts = [RunCount(expected, eta) for eta in (0.0, 1.0, math.inf)]
            noise = {count: least_tuning_noise(count, rate, steps, epsilon, delta, release) for count in counts}
            best = min(counts[:2], key=lambda count: noise[count])
            same = search_epsilon(run_rdp([MechanismEvent(single, rate, steps)], release), best, delta)
            alone = compute_epsilon(noise[best], rate, steps, delta)
            cells = [f"{epsilon:g}", f"{expected:g}", f"{best.quantile(Decimal('0.99'))}", best.name, f"{noise[best]:.3f}"]
            cells += [f"{single:.3f}", f"{noise[best] / single:.2f}", f"{alone:.2f}", f"{noise[counts[2]]:.3f}", f"{same:.2f}"]
            print_row(*cells)


if __name__ == "__main__":
    main(__doc__, speed, noise_bands, sample_level, release_error, tuning)
