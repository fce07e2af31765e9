"""speed.py: a unit test over two seconds of processor time fails, however slow or busy the machine."""

from types import SimpleNamespace

import pytest
import speed


def end(monkeypatch, used: float, slowdown: float, marker: str | None = None) -> None:
    """End a test that took so many seconds, on a machine that is so many times slower than the reference."""
    monkeypatch.setattr(speed, "reference_run", lambda: speed.REFERENCE * slowdown)
    monkeypatch.setattr(speed, "RECENT", [])
    item = SimpleNamespace(stash={speed.USED: used}, get_closest_marker=lambda name: name if name == marker else None)
    hook = speed.pytest_runtest_teardown(item)
    next(hook)
    with pytest.raises(StopIteration):
        hook.send(None)


def test_slow_unit_test_fails(monkeypatch):
    for used, slowdown in ((2.1, 1.0), (2.1, 0.5), (4.3, 2.0)):
        with pytest.raises(pytest.fail.Exception, match="s of processor time in a unit test"):
            end(monkeypatch, used, slowdown)


def test_fast_tests_slow_machines_and_integration_tests_pass(monkeypatch):
    end(monkeypatch, 1.9, 1.0)
    end(monkeypatch, 3.9, 2.0)
    end(monkeypatch, 60.0, 1.0, marker="integration")


def test_processor_time_counts_this_process():
    start = speed.processor_time()
    sum(range(10**6))
    assert speed.processor_time() > start
