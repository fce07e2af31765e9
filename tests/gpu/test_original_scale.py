"""benchmarks/original_scale.py, the first command on a real GPU, from its comparison with the CPU to its tables."""

import argparse
import sys

import pytest
from conftest import ROOT
from simulated_gpu import simulated_gpu

sys.path.append(str(ROOT / "benchmarks"))
import original_scale

SIZES = {"steps": 1, "seconds": 30.0, "microbatch": 2, "batch": 4, "authors": 40, "samples": 60, "layers": 1, "width": 64,
         "vocabulary": 500, "workers": 0, "bf16": True}  # fmt: skip


@pytest.fixture
def options(monkeypatch):
    monkeypatch.setattr(original_scale, "TOKENS", 48)
    return argparse.Namespace(**SIZES)


def test_original_scale_compares_with_the_cpu(options, monkeypatch, capsys):
    with simulated_gpu():
        assert original_scale.check_against_cpu(options)
        rows = [line for line in capsys.readouterr().out.splitlines() if line.endswith("| ok |")]
        assert len(rows) == 8  # kinds x types x passes
        monkeypatch.setattr(
            original_scale,
            "clip",
            lambda *args, clip=original_scale.clip: ((1 + 0.02 * (args[2] == "cuda")) * clip(*args)[0], clip(*args)[1]),
        )
        assert not original_scale.check_against_cpu(options)
        assert capsys.readouterr().out.count("MORE THAN") == 8


def test_original_scale_ends_with_its_tables_and_profile(options, monkeypatch, capsys):
    """All trainings; the times of roofline.py are computed in processes that this test does not start."""
    times = {"run_s": 1.0, "run_s_launches": 2.0, "peak_gib": 3.0}
    monkeypatch.setattr(
        original_scale.Predictions,
        "__init__",
        lambda self, _: setattr(
            self, "found", {(row, kind): times for row in original_scale.ROWS for kind in original_scale.KINDS}
        ),
    )
    monkeypatch.setattr(original_scale.Predictions, "wait", lambda self: None)
    arguments = [text for name, value in SIZES.items() if name != "bf16" for text in (f"--{name}", f"{value:g}")]
    with simulated_gpu(), pytest.raises(SystemExit) as ended:
        original_scale.main([*arguments, "--bf16"])
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert all(f"| {kind}, {row} | " in out for kind in original_scale.KINDS for row in original_scale.ROWS)
    assert "cuda against the CPU" in out and "Costliest operations" in out and "aten::" in out
