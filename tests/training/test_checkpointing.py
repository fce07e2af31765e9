"""checkpointing.py and interruption.py: resuming, complete checkpoints, signals. test_faults.py has real faults."""

import os
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from conftest import make_dataset, make_trainer, resumable, sample
from mutation import catches
from script_runs import PRIVACY, run_here, small
from transformers import TrainerControl

from author_dp.accounting.events import MechanismEvent
from author_dp.accounting.hash_chain import HashChain
from author_dp.accounting.ledger import PrivacyLedger
from author_dp.errors import UserError
from author_dp.models.weights import COMPLETE_MARKER
from author_dp.training.checkpointing import find_checkpoint_corruption, latest_complete_checkpoint, mark_checkpoint_complete
from author_dp.training.interruption import StopOnSignal
from author_dp.training.resuming import check_ledger_covers_checkpoint


@pytest.mark.integration
@catches("a checkpoint without its ledger", "training.resuming.find_checkpoint",
    "check_ledger_covers_checkpoint(checkpoint, ledger, is_main_process)", "pass")  # fmt: skip
def test_find_checkpoint_requires_the_ledger_of_the_checkpoint(tmp_path):
    """Otherwise its steps would be forgotten."""
    resumable(tmp_path / "a", max_steps=2).train()
    checkpoint = str(tmp_path / "a" / "checkpoint-2")
    elsewhere = "its privacy cost is not in"
    with pytest.raises(UserError, match=elsewhere):
        resumable(tmp_path / "b", resume_from_checkpoint=checkpoint)
    with pytest.raises(UserError, match=elsewhere):
        resumable(tmp_path / "b").train(resume_from_checkpoint=checkpoint)
    (tmp_path / "a" / "privacy_ledger.jsonl").unlink()
    with pytest.raises(UserError, match="lacks records"):  # but the checkpoint's report names them
        resumable(tmp_path / "a", resume_from_checkpoint=True)


@pytest.mark.integration
def test_find_checkpoint_refuses_a_checkpoint_without_privacy(tmp_path):
    plain = {"privacy": {"disable_dp": True, "noise_multiplier": None}, "save_strategy": "steps", "save_steps": 2, "max_steps": 2}
    make_trainer(tmp_path / "plain", **plain).train()
    resumable(tmp_path, max_steps=1).train()
    shutil.copytree(tmp_path / "plain" / "checkpoint-2", tmp_path / "checkpoint-2")
    with pytest.raises(UserError, match=r"another kind of run \(checkpoint-2/privacy\.json\)"):
        resumable(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    with pytest.raises(UserError, match=r"checkpoint-2: it was trained with --disable_dp"):
        check_ledger_covers_checkpoint(tmp_path / "checkpoint-2", PrivacyLedger(tmp_path / "privacy_ledger.jsonl"))
    with pytest.raises(UserError, match="holds a private run"):
        make_trainer(tmp_path, **plain)


def test_set_up_run_reads_the_ledger_once_and_after_loading(tmp_path, monkeypatch):
    """What another run wrote while data was loaded is seen, by one reading."""
    reads = []
    monkeypatch.setattr(HashChain, "read", lambda chain, read=HashChain.read: reads.append(chain.path) or read(chain))
    trainer = make_trainer(tmp_path / "out", max_steps=1)
    assert reads == [trainer.budget.ledger.path]
    trainer.train()
    with pytest.raises(UserError, match="holds the privacy ledger of an earlier run"):
        make_trainer(tmp_path / "out")


def test_find_checkpoint_refuses_a_new_run_beside_a_ledger(tmp_path):
    resumable(tmp_path, max_steps=1).train()
    with pytest.raises(UserError, match="--resume_from_checkpoint"):
        resumable(tmp_path)


@pytest.mark.integration
def test_check_author_count_requires_allow_other_authors(tmp_path):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "dataset": make_dataset([1] * 60)}
    make_trainer(tmp_path, **options).train()
    options = {**options, "dataset": make_dataset([1] * 59), "max_steps": 3, "resume_from_checkpoint": True}
    with pytest.raises(UserError, match=r"59 training authors now, 60 before.*--allow_other_authors"):
        make_trainer(tmp_path, **options)
    trainer = make_trainer(tmp_path, **options, privacy={"allow_other_authors": True})
    trainer.train()
    assert trainer.budget.ledger.steps == 3 and [run["num_authors"] for run in trainer.budget.ledger.runs] == [60, 59]
    assert trainer.budget.ledger.events == [MechanismEvent(1.0, 4 / 60, 2), MechanismEvent(1.0, 4 / 59, 1)]


def test_stop_on_signal_stops_at_once_on_a_late_second_sigint(monkeypatch):
    callback = StopOnSignal()
    callback.receive(signal.SIGTERM, None)
    for number in (signal.SIGTERM, signal.SIGINT):
        callback.receive(number, None)  # forwarded by a launcher: sooner than a person would
    callback.received_at -= 10
    callback.receive(signal.SIGTERM, None)
    with pytest.raises(KeyboardInterrupt):
        callback.receive(signal.SIGINT, None)
    assert callback.received == signal.SIGTERM


def test_stop_on_signal_keeps_a_signal_during_the_reduction(monkeypatch):
    callback, control = StopOnSignal(), TrainerControl()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, op: callback.receive(signal.SIGTERM, None))
    arguments = SimpleNamespace(device=torch.device("cpu"))
    callback.on_step_end(arguments, None, control)
    assert not control.should_training_stop
    callback.on_step_end(arguments, None, control)
    assert control.should_training_stop and control.should_save and callback.synced_signal == signal.SIGTERM


def test_prune_checkpoints_ignores_the_clock(tmp_path, monkeypatch):
    now = [2e9]

    def backwards() -> float:
        now[0] -= 3_600
        return now[0]

    def mark_and_age(folder: Path, made_with: dict) -> None:
        mark_checkpoint_complete(folder, made_with)
        os.utime(folder, (backwards(),) * 2)

    monkeypatch.setattr("author_dp.training.checkpointing.mark_checkpoint_complete", mark_and_age)
    monkeypatch.setattr(time, "time", backwards)
    trainer = make_trainer(tmp_path, max_steps=5, save_strategy="steps", save_steps=1, save_total_limit=2)
    trainer.train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-5"]
    assert latest_complete_checkpoint(tmp_path).name == "checkpoint-5" and trainer.budget.ledger.steps == 5


def corrupt(checkpoint: Path, how: str) -> None:
    if how == "marker missing":
        (checkpoint / COMPLETE_MARKER).unlink()
    elif how == "marker truncated":
        (checkpoint / COMPLETE_MARKER).write_text('{"files": ')
    elif how == "optimizer truncated":
        path = checkpoint / "optimizer.pt"
        path.write_bytes(path.read_bytes()[:-7])
    else:
        (checkpoint / "model.safetensors").unlink()


@pytest.mark.integration
@catches("a half-written checkpoint taken", "training.checkpointing.latest_complete_checkpoint", "if corruption is None:",
    "if True:",
    how="marker missing")  # fmt: skip
@pytest.mark.parametrize("how", sample(["marker missing", "marker truncated", "optimizer truncated", "model missing"]))
def test_latest_complete_skips_corrupt_checkpoints(tmp_path, how):
    make_trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=2).train()
    corrupt(tmp_path / "checkpoint-4", how)
    assert find_checkpoint_corruption(tmp_path / "checkpoint-4") and latest_complete_checkpoint(tmp_path).name == "checkpoint-2"
    with pytest.raises(UserError, match=r"checkpoint-4.*Give an earlier checkpoint"):
        make_trainer(tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    trainer = make_trainer(tmp_path, max_steps=4, resume_from_checkpoint=True, save_strategy="steps", save_steps=2)
    trainer.train()
    assert trainer.state.global_step == 4 and trainer.budget.ledger.steps == 6
    assert latest_complete_checkpoint(tmp_path).name == "checkpoint-4"  # complete again


def test_crash_while_saving_keeps_the_previous_checkpoint(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, max_steps=4, save_strategy="steps", save_steps=2, save_total_limit=1)

    def crash(folder):
        if folder.endswith("checkpoint-4"):
            raise KeyboardInterrupt

    monkeypatch.setattr(trainer, "_save_optimizer_and_scheduler", crash)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert (tmp_path / "checkpoint-4" / "model.safetensors").exists() and latest_complete_checkpoint(
        tmp_path
    ).name == "checkpoint-2"


def test_restart_without_complete_checkpoint_counts_earlier_steps(tmp_path):
    make_trainer(tmp_path, max_steps=3).train()
    trainer = make_trainer(tmp_path, max_steps=2, resume_from_checkpoint=True)
    assert trainer.checkpoint is None
    trainer.train()
    assert trainer.state.global_step == 2 and trainer.budget.ledger.steps == 5


def test_resuming_a_finished_run_takes_no_step(tmp_path):
    first = make_trainer(tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    first.train()
    again = make_trainer(tmp_path, max_steps=2, resume_from_checkpoint=True)
    again.train()
    assert again.budget.ledger.steps == 2 and again.epsilon() == pytest.approx(first.epsilon(), rel=3e-3)
    for a, b in zip(first.model.parameters(), again.model.parameters()):
        assert torch.equal(a, b)


@pytest.mark.integration
def test_user_error_releases_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr("author_dp.accounting.hash_chain.LOCK_SECONDS", 0)
    monkeypatch.setattr("author_dp.training.setup.check_budget_left", lambda *_: None)  # or it would not come so far
    make_trainer(tmp_path, max_steps=2, privacy={"noise_multiplier": None, "target_epsilon": 1.0}).train()
    spent = make_trainer(
        tmp_path, max_steps=2, privacy={"noise_multiplier": None, "target_epsilon": 1.0}, resume_from_checkpoint=True,
        dataset=make_dataset([1, 2, 3, 1, 1, 5]),
    )  # fmt: skip
    with pytest.raises(UserError, match="used up"):
        spent.train()
    with spent.budget.ledger.locked():
        pass


@pytest.mark.parametrize(
    ("name", "problem"), [("a\0b", "null byte"), ("a\ud800b", "surrogates"), ("a" * 300, "too long"), ("a/" * 2_500, "too long")]
)
def test_find_checkpoint_refuses_impossible_paths(tmp_path, name, problem):
    with pytest.raises(UserError, match=f"^--output_dir .*{problem}"):
        make_trainer(tmp_path / name)
    resumable(tmp_path, max_steps=1).train()
    with pytest.raises(UserError, match=f"^--resume_from_checkpoint .*{problem}"):
        resumable(tmp_path, resume_from_checkpoint=str(tmp_path / name))


def test_impossible_output_dir_is_one_line_for_the_user(tmp_path, monkeypatch, capfd):
    options = tmp_path / "options.yaml"
    options.write_text(r'output_dir: "a\0b"')  # a file can contain it, a command line cannot
    arguments = ["--config", str(options), *small("model", "data.jsonl", "x", *PRIVACY)]
    position = arguments.index("--output_dir")
    status, stderr = run_here(monkeypatch, capfd, *arguments[:position], *arguments[position + 2 :])
    assert status == 2 and "--output_dir" in stderr and "null byte" in stderr and "Traceback" not in stderr, stderr
