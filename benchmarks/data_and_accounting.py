"""Speed of everything around the training step, at the size of the Reddit run. Prints one table.

    python benchmarks/data_and_accounting.py
    python benchmarks/data_and_accounting.py --large

The second: 10,000,000 samples of 5,000,000 authors, and one draw over 100,000,000 authors. The first:
500,000 synthetic samples of 304,279 authors (heavy-tailed), GPT-2 sized vocabulary where ../shared/data has GPT-2's
tokenizer, the demo's tokenizer otherwise. No network, no GPU.
"""

import json
import resource
import statistics
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import datasets  # noqa: E402
import numpy as np  # noqa: E402
from transformers import GPT2TokenizerFast  # noqa: E402

from author_dp.accounting.accountant import compute_epsilon, find_noise_multiplier  # noqa: E402
from author_dp.accounting.ledger import PrivacyLedger  # noqa: E402
from author_dp.data.authors import get_column, suspicious_author_warnings  # noqa: E402
from author_dp.data.columns import ColumnSpec  # noqa: E402
from author_dp.data.loading import load_files  # noqa: E402
from author_dp.data.tokenization import tokenize  # noqa: E402
from author_dp.mechanism.microbatches import LogicalBatchDataset  # noqa: E402
from author_dp.mechanism.sampling import PoissonAuthorSampler  # noqa: E402
from data_utils import AuthorDataset, collate, group_by_author, split_by_author  # noqa: E402

SAMPLES, AUTHORS, BATCH = 500_000, 304_279, 1_024


def timed(function, repetitions=1):
    """Return the median seconds of a call, and its last result."""
    seconds = []
    for _ in range(repetitions):
        start = time.perf_counter()
        result = function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds), result


def make_corpus(path: Path) -> None:
    """Every author once, the other samples by a heavy-tailed choice; about 100 words a sample."""
    generator = np.random.default_rng(0)
    authors = np.concatenate([np.arange(AUTHORS), generator.zipf(1.6, SAMPLES - AUTHORS) % AUTHORS])
    generator.shuffle(authors)
    texts = [json.loads(line)["content"] for line in open(ROOT / "demo" / "comments.jsonl", encoding="utf-8")]
    with open(path, "w", encoding="utf-8") as file:
        for start, author in zip(generator.integers(0, len(texts) - 9, SAMPLES), authors):
            file.write(json.dumps({"author": f"user_{author}", "content": " ".join(texts[start : start + 9])}) + "\n")


def large(samples: int = 10_000_000, authors: int = 5_000_000) -> None:
    """Load, look through, group and draw ten million samples of five million authors."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path, generator = Path(folder) / "comments.jsonl", np.random.default_rng(0)
        with open(path, "w", encoding="utf-8") as file:
            for start in range(0, samples, 100_000):
                numbers = generator.integers(0, authors, 100_000)
                file.writelines(
                    f'{{"author": "user_{author}", "content": "sample {start + i} of this many, ten words or so"}}\n'
                    for i, author in enumerate(numbers)
                )
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        seconds, loaded = timed(lambda: load_files([str(path)], ColumnSpec("--train_file", "content", "author")))
        rows.append((f"load {samples:,} samples from JSONL", seconds, f"{samples / seconds:,.0f} samples/s"))
        rows.append(
            (
                "look for nobody's authors and texts of several",
                timed(lambda: suspicious_author_warnings(loaded, "content", "author"))[0],
                "",
            )
        )
        seconds, (train, _) = timed(lambda: split_by_author(loaded, "author", 0.02, 0))
        rows.append(("hold out 2 % of the authors", seconds, f"{len(loaded) - len(train):,} samples"))
        seconds, (offsets, indices) = timed(lambda: group_by_author(get_column(train, "author")))
        rows.append((f"group by {len(offsets) - 1:,} authors", seconds, ""))
    for number, its_offsets in ((len(offsets) - 1, offsets), (10**8, np.broadcast_to(np.int64(0), 10**8 + 1))):
        sampler = PoissonAuthorSampler(its_offsets, indices, sample_rate=BATCH / number, samples_per_author=1, steps=1, key=1)
        rows.append((f"one Poisson draw over {number:,} authors", timed(sampler.sample_authors, 200)[0], ""))
    report(rows, before)


def report(rows: list[tuple[str, float, str]], before: int) -> None:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print("| what | seconds | |\n|---|---|---|\n" + "\n".join(f"| {a} | {b:.4f} | {c} |" for a, b, c in rows))
    print(f"\nPeak memory {peak / 2**20:.2f} GiB, of which {before / 2**20:.2f} GiB before loading.")


def main() -> None:
    datasets.disable_progress_bars()
    shared = ROOT.parent / "shared" / "data" / "gpt2-tokenizer"
    tokenizer = GPT2TokenizerFast.from_pretrained(shared if shared.exists() else ROOT / "demo" / "model")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "comments.jsonl"
        make_corpus(path)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        load_seconds, samples = timed(lambda: load_files([str(path)], ColumnSpec("--train_file", "content", "author")))
        rows.append(("load 500,000 samples from JSONL", load_seconds, f"{SAMPLES / load_seconds:,.0f} samples/s"))
        part = samples.select(range(50_000))["content"][:]
        bare, _ = timed(
            lambda: [tokenizer(part[i : i + 1_000], truncation=True, max_length=128) for i in range(0, 50_000, 1_000)]
        )
        rows.append(("tokenizer alone, 50,000 samples", bare, f"{50_000 / bare:,.0f} samples/s"))
        token_seconds, tokens = timed(lambda: tokenize(samples, tokenizer, text_column="content", sequence_len=128))
        rows.append(("tokenize 500,000 samples", token_seconds, f"{SAMPLES / token_seconds:,.0f} samples/s"))
        authors = get_column(tokens, "author")
        group_seconds, (offsets, indices) = timed(lambda: group_by_author(authors), 5)
        rows.append((f"group by {len(offsets) - 1:,} authors", group_seconds, ""))
        options = {"sample_rate": BATCH / AUTHORS, "samples_per_author": 1, "steps": 1, "key": 1}
        sampler = PoissonAuthorSampler(offsets, indices, **options)
        rows.append(("one Poisson draw over all authors", timed(sampler.sample_authors, 20)[0], ""))
        draw_seconds, draw = timed(sampler.sample_batch, 20)
        rows.append(("the draw with its samples", draw_seconds, f"{draw.batch_size:,} authors"))
        dataset = LogicalBatchDataset(AuthorDataset(tokens, offsets, indices), 64, collate)
        rows.append(
            ("fetch and collate the draw", timed(lambda: dataset.__getitems__(draw), 20)[0], "microbatches of 64 authors")
        )
        ledger = PrivacyLedger(Path(folder) / "ledger.jsonl")
        ledger.start_run({"noise_multiplier": 0.5, "sample_rate": BATCH / AUTHORS})
        rows.append(("one step's record in the ledger, on disk", timed(ledger.record_step, 200)[0], "fsync included"))
    calibration, sigma = timed(lambda: find_noise_multiplier(BATCH / AUTHORS, 894, 8.0, 1 / AUTHORS))
    rows.append(("calibrate the noise, epsilon 8, 894 steps", calibration, f"noise multiplier {sigma:.4f}"))
    accounting, epsilon = timed(lambda: compute_epsilon(sigma, BATCH / AUTHORS, 894, 1 / AUTHORS), 5)
    rows.append(("epsilon of the run", accounting, f"epsilon {epsilon:.3f}"))
    report(rows, before)


if __name__ == "__main__":
    large() if "--large" in sys.argv else main()
