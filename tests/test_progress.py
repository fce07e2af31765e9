"""progress.py: what takes longer than five seconds shows its progress, without private counts; console.py: in authors."""

import io
import logging
import re
from types import SimpleNamespace

import pyarrow as pa
import pytest
import torch
from conftest import make_dataset, make_trainer, tiny_gpt2
from test_samples import made
from tqdm import tqdm
from transformers import ProgressCallback

from author_dp import progress
from author_dp.guards import model_check
from author_dp.logs import without_log_lines
from author_dp.progress import Progress, track, track_calls
from author_dp.training.console import TrainingBar


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self):
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    monkeypatch.setattr(progress, "time", clock := Clock())
    return clock


@pytest.fixture
def lines(monkeypatch) -> list[str]:
    monkeypatch.setattr(progress.logger, "info", (found := []).append)
    return found


def test_lines_come_after_five_seconds_and_at_growing_intervals(clock, lines):
    with Progress("Check", 200, bars=False) as shown:
        for clock.now in range(100):
            shown.update()
    assert lines == [f"Check: {(s + 1) // 2} % after {s} s" for s in (5, 10, 20, 40, 80)]


@pytest.mark.parametrize("seconds", [4.9, 5.1])
def test_bar_comes_after_five_seconds_and_shows_no_count(clock, lines, monkeypatch, seconds):
    stream = io.StringIO()
    monkeypatch.setattr(progress.logging, "is_progress_bar_enabled", lambda: True)  # whatever --disable_tqdm of other tests left
    monkeypatch.setattr(
        progress, "tqdm", lambda **options: tqdm(**{**options, "file": stream, "dynamic_ncols": False, "ncols": 60})
    )
    for count in (40, 80):
        with Progress("Step 3", count) as shown:
            for _ in range(count // 2 - 1):
                shown.update()
            clock.now += seconds
            for _ in range(count // 2 + 1):
                shown.update()
    bars = stream.getvalue()
    assert bool(bars) is (seconds > 5) and not lines
    if bars:  # half is done in five seconds: as many are left
        assert "Step 3:  50%" in bars and "00:05<00:05" in bars and "  0%" not in bars
        assert not re.search("[^:%0-9](40|80|39|41)[^%0-9]", bars)


def test_nothing_is_shown_of_nothing(clock, lines):
    clock.now = 9.0
    assert list(track([], "Step 1", bars=False)) == [] and not lines
    assert list(track([1, 2], "Step 1", bars=False)) == [1, 2]


def test_calls_of_a_model_are_progress_and_its_hooks_go(clock, lines):
    model = torch.nn.Linear(1, 1)
    with track_calls(model, "Check", 2):
        for clock.now in (1, 6, 7):
            model(torch.zeros(1))
    assert not model._forward_hooks
    assert not lines or lines == ["Check: 100 % after 6 s"]  # a line, or a bar


@pytest.mark.parametrize("clipping", ["ghost", "grad_sample"])
def test_progress_of_the_model_check_ends_at_its_end(monkeypatch, clipping):
    seen = []
    monkeypatch.setattr(progress.Progress, "update", lambda self: seen.append(self.name))
    model_check.verify_model(tiny_gpt2(dropout=0.1), clipping, 16)
    assert 1 <= len(seen) / model_check.MODEL_CALLS < 1.3


def test_progress_of_samples_ends_at_their_end(monkeypatch):
    seen = []
    monkeypatch.setattr(progress.Progress, "update", lambda self: seen.append((self.name, self.total)))
    made(make_dataset([2] * 9)).write(tiny_gpt2(), "after")
    totals = {seen.index(each): each for each in seen}
    assert {name for name, _ in seen} == {"Write samples after training"}
    assert 0.2 < len(seen) / sum(total for _, total in totals.values()) <= 1  # a text may end before


def test_steps_and_evaluations_show_progress_by_microbatch_and_batch(tmp_path, monkeypatch):
    seen = []
    dataset = make_dataset([1] * 40)
    trainer = make_trainer(tmp_path, dataset=dataset, max_steps=2, per_device_train_batch_size=20, eval_dataset=dataset)
    monkeypatch.setattr(progress.Progress, "update", lambda self: seen.append((self.name, self.has_bar)))
    trainer.train()
    trainer.evaluate()
    assert {name for name, _ in seen} == {"Step 1", "Step 2", "Evaluate"} and not any(has_bar for _, has_bar in seen)
    assert sum(name == "Step 1" for name, _ in seen) > 1 and sum(name == "Evaluate" for name, _ in seen) == 5


def test_training_is_announced_in_authors_and_with_its_accumulation(tmp_path, monkeypatch):
    records = []
    handler = logging.Handler()
    handler.emit = records.append
    logging.getLogger("transformers").addHandler(handler)
    options = {"max_steps": 3, "per_device_train_batch_size": 5, "gradient_accumulation_steps": 4, "log_level": "info"}
    try:
        make_trainer(tmp_path, dataset=make_dataset([1] * 40), **options).train()
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    text = "\n".join(record.getMessage() for record in records)
    assert "step 1 to 3, with a batch size (B) of 20 authors = 5 per device x 4 (accumulation) x 1 (processes)." in text
    assert not any(words in text for words in ("examples", "Accumulation steps = 1", "share your model"))


def test_tied_weights_are_not_said_to_be_missing(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    trainer = make_trainer(tmp_path)
    for missing in (["lm_head.weight"], ["lm_head.weight", "transformer.ln_f.bias"]):
        trainer._issue_warnings_after_load(SimpleNamespace(missing_keys=missing, unexpected_keys=[]))
    (said,) = {record.getMessage() for record in caplog.records if "missing keys" in record.getMessage()}
    assert "ln_f.bias" in said and "lm_head" not in said


def test_lines_are_dropped_inside_only():
    logger = logging.getLogger("transformers.trainer")
    record = logging.LogRecord(logger.name, logging.INFO, "", 0, "***** Running", (), None)
    with without_log_lines("trainer", ("***",)):
        assert not logger.filter(record)
    assert logger.filter(record)


def test_trainers_bar_has_a_name_and_evaluations_have_none_of_it(tmp_path):
    trainer = make_trainer(tmp_path, disable_tqdm=False)
    (bar,) = (callback for callback in trainer.callback_handler.callbacks if isinstance(callback, ProgressCallback))
    assert type(bar) is TrainingBar
    bar.on_prediction_step(trainer.args, trainer.state, trainer.control, eval_dataloader=[1, 2])
    assert bar.prediction_bar is None


def test_rows_are_counted_where_their_number_is_unknown(clock, lines, monkeypatch):
    def batches():
        for seconds in (3, 6, 7, 30):
            clock.now = seconds
            yield pa.record_batch({"text": ["x"] * 1_000})

    with Progress("Read rows", total=None) as shown:
        assert sum(batch.num_rows for batch in shown.count(batches())) == 4_000
    assert lines == ["Read rows: 2,000 after 6 s", "Read rows: 4,000 after 30 s"]
