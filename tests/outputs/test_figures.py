"""figures.py: what is drawn, by its coordinates."""

import numpy as np
import pytest
from matplotlib.figure import Figure
from mutation import catches

from author_dp.accounting.accountant import format_epsilon
from author_dp.accounting.ledger import PrivacyLedger
from author_dp.outputs import figures
from author_dp.outputs.figures import (
    draw_epsilon_figure,
    draw_losses_figure,
    draw_norms_figure,
    draw_samples_figure,
    figure_loss_points,
    figure_sample_bins,
    figure_staircase_steps,
    first_steps,
)


def epsilon_of(events, delta: float) -> float:
    """A stand-in that rises with each accounted step, in no time."""
    return sum(event.steps for event in events) ** 0.5


def make_ledger(folder, *runs: tuple[int, int]) -> PrivacyLedger:
    """A ledger of runs with (bands, steps)."""
    ledger = PrivacyLedger(folder / "privacy_ledger.jsonl")
    for bands, steps in runs:
        ledger.start_run({"noise_multiplier": 1.0, "sample_rate": 0.02, "noise_bands": bands})
        for _ in range(steps):
            ledger.record_step()
    return ledger


@catches("less epsilon drawn than was spent", "outputs.figures.draw_epsilon_figure", "for number in steps]",
    "for number in [0, *steps[:-1]]]", runs=[(4, 10)])  # fmt: skip
@pytest.mark.parametrize("runs", [[(1, 55)], [(4, 10)], [(3, 7), (1, 1), (2, 5)], [(5, 3)]])
def test_epsilon_is_a_staircase_that_never_shows_less_than_was_spent(tmp_path, monkeypatch, runs):
    monkeypatch.setattr(figures, "epsilon_of", epsilon_of)
    ledger = make_ledger(tmp_path, *runs)
    draw_epsilon_figure(axes := Figure().add_subplot(), ledger, 1e-3, 8.0)
    (stairs,) = axes.patches
    values, edges, _ = stairs.get_data()
    assert edges[0] == 0 and edges[-1] == ledger.steps
    spent = [epsilon_of(first_steps(ledger, step), 1e-3) for step in range(1, ledger.steps + 1)]
    shown = [values[np.searchsorted(edges, step) - 1] for step in range(1, ledger.steps + 1)]
    assert all(a >= b for a, b in zip(shown, spent)) and shown[-1] == spent[-1]
    if len(values) < 30:  # no stair covers two
        assert shown == spent
    assert axes.get_legend_handles_labels()[1][0] == f"spent: {format_epsilon(values[-1])} after step {ledger.steps}"


def test_stairs_end_with_cycles_and_runs(tmp_path):
    assert figure_staircase_steps(make_ledger(tmp_path, (3, 7), (1, 2), (5, 0), (2, 1))) == [3, 6, 7, 8, 9, 10]
    (tmp_path / "privacy_ledger.jsonl").unlink()
    chosen = figure_staircase_steps(make_ledger(tmp_path, (1, 100)), most=7)
    assert len(chosen) == 7 and chosen[-1] == 100


@pytest.mark.parametrize("bound", [1, 2, 3, 50, 200, 500])
def test_line_of_k_stands_between_the_bars_on_its_two_sides(bound):
    samples, authors = [1, 2, 3, 7, 200], [9_000, 30, 1, 2, 1]
    draw_samples_figure(axes := Figure().add_subplot(), samples, authors, bound)
    bars, labels = axes.patches, [label.get_text() for label in axes.get_xticklabels()]
    starts = [int(label.split("\u2013")[0]) for label in labels]
    assert sum(bar.get_height() for bar in bars) == sum(authors) and [bar.get_height() for bar in bars][:2] == [9_000, 30]
    if bound >= 200:
        assert not axes.lines and axes.get_legend() is None
        return
    (line,) = axes.lines
    before = [label for label, bar in zip(labels, bars) if bar.get_x() + bar.get_width() < line.get_xdata()[0]]
    after = [start for start, bar in zip(starts, bars) if bar.get_x() > line.get_xdata()[0]]
    assert len(before) + len(after) == len(bars)
    assert int(before[-1].split("\u2013")[-1]) == bound and after[0] == bound + 1


def test_small_bars_are_visible_and_none_is_hidden():
    draw_samples_figure(axes := Figure().add_subplot(), [1, 2, 9], [5_000, 1, 1], 1)
    axes.figure.draw_without_rendering()
    bottom, top = axes.get_ylim()
    for bar in axes.patches:
        if bar.get_height():
            assert np.log(bar.get_height() / bottom) / np.log(top / bottom) > 0.05  # of the figure's height
    legend, plot = axes.get_legend().get_window_extent(), axes.get_window_extent()
    assert legend.y0 >= plot.y1 - 1 and legend.x0 > axes.title.get_window_extent().x0
    assert {text.get_text() for text in axes.texts} >= {"5,000", "1"}


@pytest.mark.parametrize(("largest", "bound"), [(1, 1), (1, 5), (2, 1), (5, 2), (4_850, 3), (10**6, 10**5)])
def test_bins_cover_all_numbers_once(largest, bound):
    starts = figure_sample_bins(largest, bound)
    assert starts[0] == 1 and starts == sorted(set(starts)) and starts[-1] <= largest and len(starts) <= 16
    assert (bound + 1 in starts) is (bound < largest)


def test_losses_are_drawn_with_two_standard_errors():
    after = {"eval_author_loss": 1.0, "eval_author_loss_stderr": 0.25}
    training, evaluated = figure_loss_points([{"step": 4, "loss": 2.0}], {"before": {"eval_author_loss": 3.0}, "after": after})
    assert evaluated == [(0, 3.0, None), (4, 1.0, 0.25)]
    draw_losses_figure(axes := Figure().add_subplot(), training, [(0, 3.0, 0.5), (4, 1.0, 0.25)])
    (bars,) = axes.collections
    assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [[2.0, 4.0], [0.5, 1.5]]
    draw_losses_figure(Figure().add_subplot(), training, evaluated)  # of an older run: without errors


def test_single_norms_are_visible():
    counts = np.zeros(82)
    counts[[30, 41, 70]] = 1, 9_000, 1
    draw_norms_figure(axes := Figure().add_subplot(), np.logspace(-4, 4, 81), counts, 1.0)
    (stairs,) = axes.patches
    bottom, top = axes.get_ylim()
    assert stairs.get_data().values[[29, 40, 69, 50]].tolist() == [1, 9_000, 1, bottom]
    assert np.log(1 / bottom) / np.log(top / bottom) > 0.05
    assert axes.get_legend_handles_labels()[1] == ["clip norm 1: 100 % are clipped"]
    assert axes.get_xlim()[0] < 1e-4 * 10**2.9 and axes.get_xlim()[1] > 1e-4 * 10**7
