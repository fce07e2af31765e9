"""Freed memory stays with the process while it trains, and only then."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from author_dp.training.malloc import memory_kept

GLIBC = sys.platform == "linux" and "glibc" in os.confstr("CS_GNU_LIBC_VERSION")
PROGRAM = """
import resource
import torch
from author_dp.training.malloc import memory_kept

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    pieces = [torch.zeros(2**20) for _ in range(128)]  # of 4 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

def resident():
    return int(open("/proc/self/statm").read().split()[1])

with memory_kept():
    inside = [faults() for _ in range(4)][-1]
    held = resident()
print(inside, held - resident())
"""


def faults(**environment: str) -> list[int]:
    """Return the pages (of 4 KB) that a fourth round of 512 MB asks for, and what the end hands back."""
    everything = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    everything |= {"PYTHONPATH": str(Path(__file__).parent.parent), **environment}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=everything, check=True)
    return [int(word) for word in done.stdout.split()]


@pytest.mark.skipif(not GLIBC, reason="of glibc only")
def test_memory_is_kept_inside_and_handed_back_at_the_end():
    inside, handed_back = faults(MALLOC_ARENA_MAX="4")
    assert inside < 1_000 and handed_back > 100_000  # of 131,072 pages


@pytest.mark.skipif(not GLIBC, reason="of glibc only")
@pytest.mark.parametrize(
    ("name", "value"), [("MALLOC_MMAP_THRESHOLD_", "1048576"), ("GLIBC_TUNABLES", "glibc.malloc.mmap_threshold=1048576")]
)
def test_it_is_left_alone_where_the_environment_says_otherwise(name, value):
    inside, _ = faults(**{name: value})
    assert inside > 100_000


def test_nothing_is_asked_of_the_library_where_memory_counts(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", None)
    with memory_kept(False):
        pass
