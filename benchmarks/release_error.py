"""How far is a published evaluation loss from the true one? python benchmarks/release_error.py

The noise of training/public_loss.py on losses of made-up held-out authors (normal, mean 3.6, standard deviation 0.5), as
--release_eval_epsilon would release them with GPT-2's vocabulary: the root of the mean squared error over 300 releases.
"""

import math
from fractions import Fraction

import numpy as np

from author_dp.training.public_loss import GRID, discrete_laplace, noisy_mean, quantize_loss

RELEASES = 300


def error(authors: int, epsilon: float, upper: float) -> float:
    losses = np.random.default_rng(0).normal(3.6, 0.5, authors)
    sums = np.sum([quantize_loss(float(loss), upper) for loss in losses], axis=0).tolist()
    scale = Fraction(GRID) / Fraction(epsilon)
    found = [
        noisy_mean([total + discrete_laplace(scale) for total in sums], upper, GRID / epsilon)["loss"] for _ in range(RELEASES)
    ]
    return float(np.sqrt(np.mean((np.array(found) - losses.mean()) ** 2)))


def main() -> None:
    whole = math.log(50_257)
    print(
        f"| held-out authors | epsilon | error, range {whole:.3g} (default) | error, --release_eval_range 6 |\n|---|---|---|---|"
    )
    for authors, epsilon in ((100, 1.0), (1_000, 0.1), (1_000, 1.0), (10_000, 1.0)):
        print(f"| {authors:,} | {epsilon:g} | {error(authors, epsilon, whole):.3g} | {error(authors, epsilon, 6.0):.3g} |")


if __name__ == "__main__":
    main()
