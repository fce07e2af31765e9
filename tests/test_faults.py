"""Faults, each for real: processes killed, disks full, folders shared: the table of docs/troubleshooting.md."""

import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import of_a_terminal, read_report, run_script
from programs import Program, command
from test_fine_tune_dp import small
from transformers import AutoModelForCausalLM, AutoTokenizer

from author_dp.accounting.ledger import PrivacyLedger
from author_dp.training.checkpointing import latest_complete

pytestmark = pytest.mark.slow

NOISE = ["--noise_multiplier", "1", "--per_sample_max_grad_norm", "1", "--save_steps", "3", "--logging_steps", "2"]
LONG = ["--max_steps", "100000"]
GO_ON = ["--resume_from_checkpoint", "True"]
HAS_NAMESPACES = shutil.which("unshare") and subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0


def start(*arguments: str) -> Program:
    return Program(*arguments, environment={**of_a_terminal(), "OMP_NUM_THREADS": "1"})


def start_anew(*arguments: str, processes: int = 0, before: tuple[str, ...] = ()) -> subprocess.Popen:
    """With all that a command does before and after the script."""
    environment = {**of_a_terminal(), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*before, *command(*arguments, processes=processes)],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells start background jobs without it
    )  # fmt: skip


def steps_in(folder: Path) -> int:
    """Whole records of steps, without the judgement of the program."""
    path = folder / "privacy_ledger.jsonl"
    return path.read_bytes().count(b'"record": "step"') if path.exists() else 0


def wait_for_steps(process: Program | subprocess.Popen, folder: Path, steps: int) -> None:
    deadline = time.monotonic() + 120
    while steps_in(folder) < steps:
        assert process.poll() is None, end_of(process)
        assert time.monotonic() < deadline
        time.sleep(0.02)


def end_of(process: Program | subprocess.Popen, seconds: float = 60) -> tuple[int, str]:
    """Return the exit status and what was said on stderr."""
    if isinstance(process, Program):
        done = process.wait(seconds)
        return done.returncode, done.stderr
    _, stderr = process.communicate(timeout=seconds)
    return process.returncode, stderr


def children(pid: int) -> dict[int, dict[str, str]]:
    """Child processes with their environment."""
    found = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        pairs = Path(f"/proc/{child}/environ").read_bytes().decode().split("\0")
        found[int(child)] = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    return found


def goes_on(arguments: list[str], folder: Path, lost_before: int, processes: int = 0) -> None:
    """Resume for two steps beyond the newest whole checkpoint; everything that was in the ledger must stay counted."""
    checkpoint = latest_complete(folder)
    steps = int(checkpoint.name.split("-")[1]) + 2
    arguments = [*arguments, *GO_ON, "--max_steps", str(steps)]
    done = run_script(*arguments, processes=processes)
    assert done.returncode == 0, done.stderr
    report = read_report(folder)
    assert report["steps"] == PrivacyLedger(folder / "privacy_ledger.jsonl").steps == lost_before + 2


def test_kill_minus_9_loses_no_step(checkpoint, comments, tmp_path):
    arguments = small(checkpoint, comments, tmp_path / "out", *NOISE)
    process = start(*arguments, *LONG)
    wait_for_steps(process, tmp_path / "out", 8)
    process.send_signal(signal.SIGKILL)
    assert end_of(process)[0] == -signal.SIGKILL
    taken = PrivacyLedger(tmp_path / "out" / "privacy_ledger.jsonl").steps
    assert taken >= 8 and latest_complete(tmp_path / "out") is not None
    goes_on(arguments, tmp_path / "out", taken)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_kill_minus_9_of_one_of_two_processes_ends_the_other(checkpoint, comments, tmp_path, rank):
    arguments = small(checkpoint, comments, tmp_path / "out", *NOISE)
    process = start_anew(*arguments, *LONG, processes=2)
    wait_for_steps(process, tmp_path / "out", 5)
    (victim,) = (pid for pid, environment in children(process.pid).items() if environment.get("RANK") == rank)
    os.kill(victim, signal.SIGKILL)
    status, stderr = end_of(process)
    assert status != 0 and "another process of this run has ended" in stderr and "--resume_from_checkpoint True" in stderr, stderr
    goes_on(arguments, tmp_path / "out", PrivacyLedger(tmp_path / "out" / "privacy_ledger.jsonl").steps, processes=2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_a_checkpoint(checkpoint, comments, tmp_path, number):
    arguments = small(checkpoint, comments, tmp_path / "out", *NOISE, "--save_strategy", "no")
    process = start(*arguments, *LONG)
    wait_for_steps(process, tmp_path / "out", 4)
    process.send_signal(number)
    status, stderr = end_of(process)
    assert status == 128 + number and "Traceback" not in stderr and "--resume_from_checkpoint True" in stderr, stderr
    taken = steps_in(tmp_path / "out")
    assert latest_complete(tmp_path / "out").name == f"checkpoint-{taken}"  # not one step is lost
    if number == signal.SIGINT:
        goes_on(arguments, tmp_path / "out", taken)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_the_launcher_saves_one_checkpoint_of_all_processes(checkpoint, comments, tmp_path, number):
    """Which hands it on, once or twice."""
    process = start_anew(*small(checkpoint, comments, tmp_path / "out", *NOISE, "--save_strategy", "no"), *LONG, processes=2)
    wait_for_steps(process, tmp_path / "out", 4)
    for pid in [process.pid, *children(process.pid)] if number == signal.SIGINT else [process.pid]:
        os.kill(pid, number)  # a terminal sends Ctrl-C to all
    status, stderr = end_of(process)
    taken = steps_in(tmp_path / "out")
    assert status != 0 and latest_complete(tmp_path / "out").name == f"checkpoint-{taken}", stderr


def test_a_signal_while_loading_has_no_traceback(checkpoint, comments, tmp_path):
    process = start_anew(*small(checkpoint, comments, tmp_path / "out", *NOISE))
    while b"fine-tune-dp" not in Path(f"/proc/{process.pid}/cmdline").read_bytes():
        time.sleep(0.01)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    status, stderr = end_of(process)
    assert status in (130, -signal.SIGINT) and not (tmp_path / "out" / "privacy_ledger.jsonl").exists(), stderr


def on_a_small_disk(folder: Path, size: str, *arguments: str) -> tuple[int, str, int]:
    """Run with an output folder of `size` bytes; return status, stderr, and the steps that the ledger there holds."""
    folder.mkdir()
    inside = 'mount -t tmpfs -o size="$1" tmpfs "$2" || exit 99; "${@:4}"; status=$?; cp "$2"/*.jsonl "$3"; exit $status'
    shell = ("unshare", "-rm", "bash", "-c", inside, "bash", size, str(folder), str(folder.parent))
    process = start_anew(*arguments, before=shell)
    status, stderr = end_of(process, 120)
    return status, stderr, steps_in(folder.parent)


@pytest.mark.skipif(not HAS_NAMESPACES, reason="a small disk needs user namespaces")
def test_a_disk_too_full_for_the_ledger_stops_before_the_update(checkpoint, comments, tmp_path):
    arguments = small(checkpoint, comments, tmp_path / "out", *NOISE, "--save_strategy", "no", *LONG)
    status, stderr, steps = on_a_small_disk(tmp_path / "out", "8k", *arguments)
    assert status == 2 and "privacy_ledger.jsonl: cannot be written (No space left on device)" in stderr, stderr
    assert "Traceback" not in stderr and 5 < steps < 100


@pytest.mark.skipif(not HAS_NAMESPACES, reason="a small disk needs user namespaces")
@pytest.mark.parametrize("size", ["2m", "7m"], ids=["model", "optimizer"])
def test_a_disk_too_full_for_a_checkpoint_says_so(checkpoint, comments, tmp_path, size):
    status, stderr, steps = on_a_small_disk(tmp_path / "out", size, *small(checkpoint, comments, tmp_path / "out", *NOISE, *LONG))
    assert status == 2 and "--output_dir cannot be written" in stderr and "Traceback" not in stderr, stderr
    assert steps == 3


def broken_model(checkpoint: str, comments: Path, folder: Path, words: list[str]) -> Path:
    """A model whose logits overflow for every sample that holds one of the tokens of `words`."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    config = AutoModelForCausalLM.from_pretrained(checkpoint).config
    config.tie_word_embeddings, config.embd_pdrop, config.resid_pdrop, config.attn_pdrop = False, 0, 0, 0
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for word in words:
            model.transformer.wte.weight[tokenizer(word)["input_ids"]] = 3e38 * torch.tensor([1.0, -1.0] * 8)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_loss_that_is_not_finite_for_one_author_or_for_all(checkpoint, tmp_path):
    rows = [{"author": str(a), "content": "the cat sat on the mat"} for a in range(30)]
    for words, expected in ((["zebra"], 1), (["zebra", "the"], 31)):
        data = tmp_path / f"{expected}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"author": "z", "content": "zebra crossing"}]))
        model = broken_model(checkpoint, data, tmp_path / f"model{expected}", words)
        out = tmp_path / f"out{expected}"
        arguments = [*small(model, data, out), *NOISE, "--per_device_train_batch_size", "64", "--eval_fraction", "0"]
        done = run_script(*arguments, "--max_steps", "2")
        assert done.returncode == 0 and f"The gradients of {2 * expected} authors were not finite" in done.stderr, done.stderr
        trained = AutoModelForCausalLM.from_pretrained(out)
        assert all(parameter.isfinite().all() for parameter in trained.parameters())
        assert read_report(out)["steps"] == 2


def test_weights_gone_astray_stop_the_run_and_are_not_saved(checkpoint, comments, tmp_path):
    arguments = small(checkpoint, comments, tmp_path / "out", *NOISE, "--learning_rate", "1e38", "--optim", "sgd")
    done = run_script(*arguments, "--noise_multiplier", "100")
    assert done.returncode == 2 and "--learning_rate" in done.stderr and "not finite" in done.stderr, done.stderr
    assert latest_complete(tmp_path / "out") is None and "Traceback" not in done.stderr


def test_a_data_loader_worker_that_dies_ends_the_run(checkpoint, comments, tmp_path):
    arguments = small(checkpoint, comments, tmp_path / "out", *NOISE, "--dataloader_num_workers", "1")
    process = start(*arguments, *LONG)
    wait_for_steps(process, tmp_path / "out", 5)
    (worker,) = children(process.pid)
    os.kill(worker, signal.SIGKILL)
    status, stderr = end_of(process)
    assert status == 2 and "--dataloader_num_workers" in stderr and "Traceback" not in stderr, stderr
    goes_on(arguments, tmp_path / "out", PrivacyLedger(tmp_path / "out" / "privacy_ledger.jsonl").steps)


def test_a_second_run_into_the_folder_is_refused(checkpoint, comments, tmp_path):
    arguments = small(checkpoint, comments, tmp_path / "out", *NOISE)
    process = start(*arguments, *LONG)
    wait_for_steps(process, tmp_path / "out", 4)
    for more in ([], GO_ON):
        done = run_script(*arguments, *more)
        assert done.returncode == 2 and "in use by another run" in done.stderr, done.stderr
    process.send_signal(signal.SIGTERM)
    assert end_of(process)[0] == 143 and PrivacyLedger(tmp_path / "out" / "privacy_ledger.jsonl").steps >= 4
