"""What a sample-level guarantee would promise an author: epsilon against the author's number of samples. Prints one table.

python benchmarks/sample_level.py [--samples 44649] [--authors 20000] [--batch 1024] [--epochs 2]

A run whose privacy unit is the sample, at sample-level epsilon 8. All m samples of one author together: each step draws a
binomial number of them, which moves the sum by as many clip norms; composed exactly by dp-accounting (mixture of Gaussians).
"""

import argparse
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dp_accounting.pld.privacy_loss_distribution import from_mixture_gaussian_mechanism
from scipy import stats

from author_dp.accounting.accountant import find_noise_multiplier


def author_epsilon(sigma: float, rate: float, steps: int, samples: int, delta: float) -> float:
    """Epsilon of an author with so many samples, add or remove one author."""
    counts = range(min(samples, int(samples * rate + 10 * math.sqrt(samples * rate) + 10)) + 1)
    loss = from_mixture_gaussian_mechanism(
        sigma, counts, [float(p) for p in normalized(stats.binom.pmf(counts, samples, rate))], value_discretization_interval=1e-2
    )
    return loss.self_compose(steps).get_epsilon_for_delta(delta)


def normalized(values):
    return values / values.sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=44_649)
    parser.add_argument("--authors", type=int, default=20_000)
    parser.add_argument("--batch", type=int, default=1_024)
    parser.add_argument("--epochs", type=float, default=2)
    args = parser.parse_args()
    delta, rate = 1 / args.authors, args.batch / args.samples
    steps = math.ceil(args.epochs / rate)
    sigma = find_noise_multiplier(rate, steps, 8.0, delta)
    by_author = find_noise_multiplier(args.batch / args.authors, math.ceil(args.epochs * args.authors / args.batch), 8.0, delta)
    print(f"sample level: sample rate {rate:.4f}, {steps} steps, noise multiplier {sigma:.4f}, epsilon 8 at delta {delta:.2g}")
    print(f"author level at the same epsilon, batch and epochs: noise multiplier {by_author:.4f}\n")
    print("| samples of the author | epsilon that the sample-level run promises the author |\n|---|---|")
    for samples in (1, 2, 5, 10, 20, 50, 100):
        print(f"| {samples} | {author_epsilon(sigma, rate, steps, samples, delta):.1f} |")


if __name__ == "__main__":
    main()
