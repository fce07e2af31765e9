"""What a private search costs: its noise multiplier against that of a single run at the same epsilon. Prints one table.

    python benchmarks/tuning.py

Computed for the demo of the README: 154 steps at sample rate 0.0131, delta 5.1e-5. Each run releases its evaluation loss, with
1/16 of the search's epsilon. "Alone" is the epsilon of one of its runs, if there were no search. "Same noise" is the epsilon of a
search whose runs have the noise of a single run at the epsilon in front.
"""

import math
import sys
from decimal import Decimal
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from author_dp.accounting.accountant import MechanismEvent, compute_epsilon, find_noise_multiplier
from author_dp.accounting.tuning import Release, RunCount, least_noise, run_rdp, search_epsilon

RATE, STEPS, DELTA = 256 / 19_600, 154, 1 / 19_600


def main() -> None:
    print(
        "| epsilon | expected runs | at most, 99 % | law | noise multiplier | single run | ratio | alone | Poisson | same noise |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for epsilon in (1.0, 8.0):
        single, release = find_noise_multiplier(RATE, STEPS, epsilon, DELTA), Release(epsilon / 16)
        for expected in (2.0, 6.0, 20.0):
            counts = [RunCount(expected, eta) for eta in (0.0, 1.0, math.inf)]
            noise = {count: least_noise(count, RATE, STEPS, epsilon, DELTA, release) for count in counts}
            best = min(counts[:2], key=lambda count: noise[count])
            same = search_epsilon(run_rdp([MechanismEvent(single, RATE, STEPS)], release), best, DELTA)
            alone = compute_epsilon(noise[best], RATE, STEPS, DELTA)
            cells = [f"{epsilon:g}", f"{expected:g}", f"{best.quantile(Decimal('0.99'))}", best.name, f"{noise[best]:.3f}"]
            cells += [f"{single:.3f}", f"{noise[best] / single:.2f}", f"{alone:.2f}", f"{noise[counts[2]]:.3f}", f"{same:.2f}"]
            print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
