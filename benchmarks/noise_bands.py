"""What correlated noise brings (--noise_bands): the error that is computed, and evaluation losses of the demo that are measured.

python benchmarks/noise_bands.py computed
python benchmarks/noise_bands.py measured [--only epsilon-8|uncorrected|sgd|epsilons] [--repetitions 1] [--parallel 1]
                                          [--plays FILE] [--cache bands.jsonl]

Every measured run is the script itself on the demo's corpus: expected batch 256 authors, 154 steps, a constant rate; those of
"uncorrected" are by plain Adam. With --plays, runs on FILE, as those of results.py, expected batch 32, 520 steps, come instead.
Runs that are in the cache are not repeated.
"""

import argparse
import math
from pathlib import Path

import numpy as np
from results import mean_and_spread, measure, plays

from author_dp.accounting.accountant import cyclic_event, find_noise_multiplier
from author_dp.accounting.banded_mf import BAND_CHOICES, prefix_sum_rmse, step_noise_std, toeplitz_coefficients

RUNS = {  # expected batch, authors, steps
    "the original example, 3 epochs": (1_024, 304_279, 894),
    "the demo, 2 epochs": (256, 19_589, 154),
    "10,000 authors, 120 steps of 256": (256, 10_000, 120),
}


def computed() -> None:
    """Print the error of prefix sums, and the noise of a step, over those of independent noise at the same epsilon."""
    print("| run | epsilon | " + " | ".join(f"b = {bands}" for bands in BAND_CHOICES[1:]) + " |")
    print("|---" * (len(BAND_CHOICES) + 1) + "|")
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
                cells.append(f"{error:.2f} ({sigma * step_noise_std(c, steps) / plain:.1f})")
            print(f"| {name} | {epsilon} | {' | '.join(cells)} |")


def options(epsilon: float | None, bands: str, rate: str, more: str = "") -> str:
    promise = "--disable_dp" if epsilon is None else f"--target_epsilon {epsilon} --noise_bands {bands}"
    batch = "--per_device_train_batch_size 64 --gradient_accumulation_steps 4 --num_train_epochs 2"
    return f"{batch} --learning_rate {rate} --lr_scheduler_type constant {promise}{more}"


SGD = " --optim sgd --optim_args momentum=0.9"
PLAIN_ADAM = " --adam_noise_correction False"
GRIDS = {
    "epsilon-8": {
        **{("1", rate): options(8, "1", rate) for rate in ("5e-3", "1e-2", "2e-2")},
        **{(bands, "1e-2"): options(8, bands, "1e-2") for bands in ("2", "4", "8", "16", "auto")},
        **{("8", rate): options(8, "8", rate) for rate in ("5e-3", "2e-2")},
        ("not private", "1e-2"): options(None, "1", "1e-2"),
    },
    "uncorrected": {
        **{(bands, "1e-2"): options(8, bands, "1e-2", PLAIN_ADAM) for bands in ("2", "4", "8")},
        **{(bands, "2e-2"): options(8, bands, "2e-2", PLAIN_ADAM) for bands in ("2", "4", "8", "16")},
        **{("8", rate): options(8, "8", rate, PLAIN_ADAM) for rate in ("5e-3", "4e-2")},
    },
    "sgd": {(bands, rate): options(8, bands, rate, SGD) for rate in ("0.3", "1", "3") for bands in ("1", "8")},
    "epsilons": {
        (f"epsilon {epsilon}, b = {bands}", "1e-2"): options(epsilon, bands, "1e-2")
        for epsilon in (4, 2, 1)
        for bands in ("1", "8" if epsilon > 1 else "4")
    },
}


def plays_grid(file: Path) -> dict:
    return {
        (bands, rate): plays(file, 520, 32, rate, 8, f"--noise_bands {bands}")
        for rate in ("5e-3", "1e-2")
        for bands in ("1", "8")
    }


def measured(args: argparse.Namespace) -> None:
    for name, runs in ({"plays": plays_grid(args.plays)} if args.plays else GRIDS).items():
        if args.only in (None, name):
            losses = measure(runs, args.repetitions, args.parallel, args.cache)
            rates = list(dict.fromkeys(rate for _, rate in runs))
            print(f"\n| {name}: b | " + " | ".join(f"rate {rate}" for rate in rates) + " |\n|---" + "|---" * len(rates) + "|")
            for row in dict.fromkeys(row for row, _ in runs):
                cells = [mean_and_spread(losses.get((row, rate), [math.nan])) for rate in rates]
                print(f"| {row} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["computed", "measured"])
    parser.add_argument("--only", choices=list(GRIDS))
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--parallel", type=int, default=1, help="runs at once, of one thread each")
    parser.add_argument("--cache", type=Path, default=Path("bands.jsonl"))
    parser.add_argument(
        "--plays", type=Path, metavar="FILE", help="of author and content, few authors, instead of the demo's corpus"
    )
    args = parser.parse_args()
    computed() if args.what == "computed" else measured(args)


if __name__ == "__main__":
    main()
