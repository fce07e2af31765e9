"""Drawing the noise of one step of GPT-2 small, 124 million normals on the CPU, in several ways. Prints one table.

python benchmarks/noise.py
"""

import secrets
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
import torch

from author_dp.mechanism.noise import GaussianNoise

SIZE = 124_439_808
RUNS = 7


def main() -> None:
    total, threads = torch.ones(SIZE), torch.get_num_threads()
    source, hardened = GaussianNoise(torch.device("cpu")), GaussianNoise(torch.device("cpu"), secure=True)
    generator = torch.Generator()
    philox = [np.random.Generator(np.random.Philox(key=secrets.randbits(128))) for _ in range(threads)]
    parts = np.array_split(total.numpy(), threads)

    def ours(source: GaussianNoise = source) -> None:
        for part in total.split(source.chunk_size):
            source.add_(part, 1.0)

    def numpy() -> None:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda g, part: np.add(part, g.standard_normal(len(part), dtype=np.float32), out=part), philox, parts))

    ways = {
        "this project: AES-128 in counter mode, Box-Muller": ours,
        "the same with --secure_noise: four draws summed": lambda: ours(hardened),
        f"numpy: Philox, ziggurat, {threads} threads": numpy,
        "torch: Mersenne twister (32-bit seed: not private)": lambda: total.add_(torch.empty(SIZE).normal_(generator=generator)),
        "no noise: add 1, the speed of memory": lambda: total.add_(1.0),
    }
    seconds = {name: [] for name in ways}
    for _ in range(RUNS):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - start)
    print(f"{SIZE:,} normals added in place, {threads} CPU cores, torch {torch.__version__}, medians of {RUNS}\n")
    print("| way | seconds | GB/s written |\n|---|---|---|")
    for name, times in seconds.items():
        median = statistics.median(times)
        print(f"| {name} | {median:.3f} | {4 * SIZE / median / 1e9:.1f} |")


if __name__ == "__main__":
    main()
