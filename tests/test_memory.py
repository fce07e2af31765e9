"""Freed memory stays with the process while it trains, and only then."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

GLIBC = sys.platform == "linux" and "glibc" in os.confstr("CS_GNU_LIBC_VERSION")
PROGRAM = """
import resource, sys
import torch
from author_dp.memory import memory_kept

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    pieces = [torch.zeros(2**20) for _ in range(128)]  # of 4 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1])

with memory_kept(sys.argv[1] == "keep"):
    inside = [faults() for _ in range(4)][-1]
    held = resident()
print(inside, held - resident(), max(faults() for _ in range(4)))
"""


def faults(keep: str, **environment: str) -> list[int]:
    """Return the pages (of 4 KB) that a fourth round of 512 MB asks for, what the end hands back, and what each needs then."""
    everything = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    everything |= {"PYTHONPATH": str(Path(__file__).parent.parent), **environment}
    done = subprocess.run([sys.executable, "-c", PROGRAM, keep], capture_output=True, text=True, env=everything, check=True)
    return [int(word) for word in done.stdout.split()]


@pytest.mark.skipif(not GLIBC, reason="of glibc only")
def test_memory_is_kept_inside_and_handed_back_at_the_end():
    inside, handed_back, after = faults("keep", MALLOC_ARENA_MAX="4")
    assert inside < 1_000 and handed_back > 100_000 and after > 50_000  # of 131,072 pages


@pytest.mark.skipif(not GLIBC, reason="of glibc only")
@pytest.mark.parametrize("keep, name, value", [
    ("no", "MALLOC_ARENA_MAX", "4"), ("keep", "MALLOC_MMAP_THRESHOLD_", "1048576"),
    ("keep", "GLIBC_TUNABLES", "glibc.malloc.trim_threshold=65536"),
])  # fmt: skip
def test_it_is_left_alone_where_it_is_asked_to_be(keep, name, value):
    inside, _, after = faults(keep, **{name: value})
    assert inside > 50_000 and after > 50_000
