"""A unit test takes at most a second of processor time (by MARGIN, two); one that takes longer is an integration test.

Processor time, too, is longer on a slower machine, or beside programs that share its caches and cores. It is therefore counted
in seconds of a quiet machine on which `reference_run` takes REFERENCE seconds: the run is timed again soon after a test that
took longer. `python tests/speed.py` prints what it takes.
"""

import gc
import resource
import sys
import tempfile
import time
from pathlib import Path

import pytest

LIMIT = 1.0
MARGIN = 2.0  # the limit that fails is so many times higher: processors differ in what they are slow at
REFERENCE = 0.25
USED = pytest.StashKey[float]()
RECENT: list[float] = []  # when the slowdown was measured last, and the slowdown


def processor_time() -> float:
    """Return the seconds that this process and the processes that it waited for have used."""
    usages = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def reference_run() -> float:
    """Return the seconds of a training of one step, with its model check."""
    from conftest import make_trainer

    start = processor_time()
    with tempfile.TemporaryDirectory() as folder:
        make_trainer(Path(folder) / "run").train()
    return processor_time() - start


def slowdown(runs: int) -> float:
    """Return how many times slower than the reference machine this one is now: the most of several runs, at least 1."""
    return max(1.0, max(reference_run() for _ in range(runs)) / REFERENCE)


def scaled(seconds: float) -> float:
    """Return processor time in seconds of the reference machine; those within the limit stay."""
    if seconds <= LIMIT:
        return seconds
    if not RECENT or time.monotonic() - RECENT[0] > 30:
        RECENT[:] = time.monotonic(), slowdown(1)
    if seconds <= LIMIT * RECENT[1]:  # without runs of its own, as many tests come here on a slow machine
        return seconds / RECENT[1]
    return seconds / slowdown(3)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item):
    start = processor_time()
    try:
        return (yield)
    finally:
        item.stash[USED] = processor_time() - start


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_teardown(item: pytest.Item):
    """Fail after all fixtures have ended: what they replace must not change the reference."""
    result = yield
    is_unit = not item.get_closest_marker("integration") and not hasattr(item, "bug")
    is_unit = is_unit and not getattr(item, "nodeid", "").startswith("tests/gpu/")  # all of them are one integration test
    if is_unit and (used := scaled(item.stash.get(USED, 0.0))) > MARGIN * LIMIT:
        pytest.fail(f"{used:.1f} s of processor time in a unit test: make it faster, or an integration test", pytrace=False)
    return result


if __name__ == "__main__":
    sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
    reference_run()  # imports
    gc.freeze()  # as conftest.py does
    print(*(f"{seconds:.3f}" for seconds in sorted(reference_run() for _ in range(10))))
