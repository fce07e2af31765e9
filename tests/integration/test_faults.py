"""Real faults: killed processes, full disks, shared folders; the table of docs/troubleshooting.md."""

import atexit
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, read_report, run_script
from script_runs import SCRIPT, Program, command, small
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from author_dp.accounting.ledger import PrivacyLedger
from author_dp.training.checkpointing import latest_complete_checkpoint

pytestmark = pytest.mark.integration

NOISE = ["--noise_multiplier", "1", "--per_sample_max_grad_norm", "1", "--save_steps", "3", "--logging_steps", "2"]
LONG = ["--max_steps", "100000"]
RESUME = ["--resume_from_checkpoint", "True"]
HAS_NAMESPACES = shutil.which("unshare") and subprocess.run(["unshare", "-rm", "true"], capture_output=True).returncode == 0


def start(*arguments: str) -> Program:
    return Program(*command(*arguments)[1:], environment={**os.environ, "OMP_NUM_THREADS": "1"})


def start_process(*arguments: str, processes: int = 0, before: tuple[str, ...] = ()) -> subprocess.Popen:
    """Start the script in a new interpreter, with imports and exit; `before` is a command that runs it."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [*before, *command(*arguments, processes=processes)],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True, env=environment,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # shells start background jobs without it
    )  # fmt: skip
    atexit.register(process.terminate)  # where a test fails before
    return process


def count_step_records(folder: Path) -> int:
    """Return the number of complete step records, counted without the library."""
    path = folder / "privacy_ledger.jsonl"
    return path.read_bytes().count(b'"record": "step"') if path.exists() else 0


def wait_for_steps(process: Program | subprocess.Popen, folder: Path, steps: int) -> None:
    deadline = time.monotonic() + 120
    while count_step_records(folder) < steps:
        assert process.poll() is None, wait_for_end(process)
        assert time.monotonic() < deadline
        time.sleep(0.02)


def wait_for_end(process: Program | subprocess.Popen, seconds: float = 60) -> tuple[int, str]:
    """Return the exit status and stderr."""
    if isinstance(process, Program):
        done = process.wait(seconds)
        return done.returncode, done.stderr
    _, stderr = process.communicate(timeout=seconds)
    return process.returncode, stderr


def children(pid: int) -> dict[int, dict[str, str]]:
    """Return the child processes with their environments."""
    found = {}
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        pairs = Path(f"/proc/{child}/environ").read_bytes().decode().split("\0")
        found[int(child)] = dict(pair.split("=", 1) for pair in pairs if "=" in pair)
    return found


def check_resumes(arguments: list[str], folder: Path, recorded_before: int, processes: int = 0) -> None:
    """Resume for two steps from the newest complete checkpoint; all recorded steps must still count."""
    checkpoint = latest_complete_checkpoint(folder)
    steps = int(checkpoint.name.split("-")[1]) + 2
    arguments = [*arguments, *RESUME, "--max_steps", str(steps)]
    done = run_script(*arguments, processes=processes)
    assert done.returncode == 0, done.stderr
    report = read_report(folder)
    assert report["steps"] == PrivacyLedger(folder / "privacy_ledger.jsonl").steps == recorded_before + 2


def test_sigkill_loses_no_step(checkpoint, comments, tmp_path):
    arguments = small(checkpoint, comments, tmp_path / "out", *NOISE)
    process = start(*arguments, *LONG)
    wait_for_steps(process, tmp_path / "out", 8)
    process.send_signal(signal.SIGKILL)
    assert wait_for_end(process)[0] == -signal.SIGKILL
    recorded = PrivacyLedger(tmp_path / "out" / "privacy_ledger.jsonl").steps
    assert recorded >= 8 and latest_complete_checkpoint(tmp_path / "out") is not None
    check_resumes(arguments, tmp_path / "out", recorded)


@pytest.mark.parametrize("rank", ["0", "1"])
def test_sigkill_of_one_process_ends_the_other(checkpoint, comments, tmp_path, rank):
    arguments = small(checkpoint, comments, tmp_path / "out", *NOISE)
    process = start_process(*arguments, *LONG, processes=2)
    wait_for_steps(process, tmp_path / "out", 5)
    (victim,) = (pid for pid, environment in children(process.pid).items() if environment.get("RANK") == rank)
    os.kill(victim, signal.SIGKILL)
    status, stderr = wait_for_end(process)
    assert status != 0 and "another process of this run has ended" in stderr and "--resume_from_checkpoint True" in stderr, stderr
    check_resumes(arguments, tmp_path / "out", PrivacyLedger(tmp_path / "out" / "privacy_ledger.jsonl").steps, processes=2)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_saves_a_checkpoint(checkpoint, comments, tmp_path, number):
    arguments = small(checkpoint, comments, tmp_path / "out", *NOISE, "--save_strategy", "no")
    process = start(*arguments, *LONG)
    wait_for_steps(process, tmp_path / "out", 4)
    process.send_signal(number)
    status, stderr = wait_for_end(process)
    assert status == 128 + number and "Traceback" not in stderr and "--resume_from_checkpoint True" in stderr, stderr
    recorded = count_step_records(tmp_path / "out")
    assert latest_complete_checkpoint(tmp_path / "out").name == f"checkpoint-{recorded}"  # no step is lost
    if number == signal.SIGINT:
        check_resumes(arguments, tmp_path / "out", recorded)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signal_to_the_launcher_saves_one_checkpoint(checkpoint, comments, tmp_path, number):
    """The launcher forwards it, once or twice."""
    process = start_process(*small(checkpoint, comments, tmp_path / "out", *NOISE, "--save_strategy", "no"), *LONG, processes=2)
    wait_for_steps(process, tmp_path / "out", 4)
    for pid in [process.pid, *children(process.pid)] if number == signal.SIGINT else [process.pid]:
        os.kill(pid, number)  # a terminal sends Ctrl-C to all
    status, stderr = wait_for_end(process)
    recorded = count_step_records(tmp_path / "out")
    assert status != 0 and latest_complete_checkpoint(tmp_path / "out").name == f"checkpoint-{recorded}", stderr


def test_sigint_during_imports_prints_no_traceback(checkpoint, comments, tmp_path):
    process = start_process(*small(checkpoint, comments, tmp_path / "out", *NOISE))
    while b"fine-tune-dp" not in Path(f"/proc/{process.pid}/cmdline").read_bytes():
        time.sleep(0.01)
    time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    status, stderr = wait_for_end(process)
    assert status in (130, -signal.SIGINT) and not (tmp_path / "out" / "privacy_ledger.jsonl").exists(), stderr


def run_on_small_disk(folder: Path, size: str, *arguments: str, fill: bool = False) -> tuple[int, str, int]:
    """Run with an output folder of `size` bytes; return status, stderr, and the number of recorded steps.

    Args:
        fill: whether something else fills the disk after some steps.
    """
    folder.mkdir()
    wait = 'until [ $(grep -c step "$2"/privacy_ledger.jsonl 2>/dev/null || true)0 -gt 60 ]; do sleep 0.05; done'
    filling = f'({wait}; cat /dev/zero > "$2"/filler) 2>/dev/null & ' if fill else ""
    inside = f'mount -t tmpfs -o size="$1" tmpfs "$2" || exit 99; {filling}'
    inside += '"${@:4}"; status=$?; test ! -e "$2"/privacy_ledger.jsonl || cp "$2"/*.jsonl "$3"; exit $status'
    shell = ("unshare", "-rm", "bash", "-c", inside, "bash", size, str(folder), str(folder.parent))
    process = start_process(*arguments, before=shell)
    status, stderr = wait_for_end(process, 120)
    return status, stderr, count_step_records(folder.parent)


@pytest.mark.skipif(not HAS_NAMESPACES, reason="a small disk needs user namespaces")
def test_full_disk_stops_before_an_unrecorded_step(checkpoint, comments, tmp_path):
    """The room for the result is there at first, and another program takes it."""
    arguments = small(checkpoint, comments, tmp_path / "out", *NOISE, "--save_strategy", "no", *LONG)
    status, stderr, steps = run_on_small_disk(tmp_path / "out", "20m", *arguments, fill=True)
    assert status == 2 and "privacy_ledger.jsonl: cannot be written (No space left on device)" in stderr, stderr
    assert "Traceback" not in stderr and 5 < steps < 10_000


@pytest.mark.skipif(not HAS_NAMESPACES, reason="a small disk needs user namespaces")
@pytest.mark.parametrize("size", ["2m", "7m"], ids=["model", "optimizer"])
def test_small_disk_is_refused_before_the_first_step(checkpoint, comments, tmp_path, size):
    model, tokenizer = tmp_path / "model", AutoTokenizer.from_pretrained(checkpoint)
    GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer), n_positions=128, n_embd=168, n_layer=2, n_head=2)).save_pretrained(
        model
    )
    tokenizer.save_pretrained(model)  # 3 MB, and 6 of Adam's moments
    status, stderr, steps = run_on_small_disk(tmp_path / "out", size, *small(model, comments, tmp_path / "out", *NOISE, *LONG))
    assert status == 2 and "the result and a checkpoint need" in stderr and "Traceback" not in stderr, stderr
    assert steps == 0


def make_overflowing_model(checkpoint: str, comments: Path, folder: Path, words: list[str]) -> Path:
    """Save a model whose logits overflow for every sample with a token of `words`."""
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


def test_non_finite_gradients_are_left_out_of_the_step(checkpoint, tmp_path):
    rows = [{"author": str(a), "content": "the cat sat on the mat"} for a in range(30)]
    for words, expected in ((["zebra"], 1), (["zebra", "the"], 31)):
        data = tmp_path / f"{expected}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"author": "z", "content": "zebra crossing"}]))
        model = make_overflowing_model(checkpoint, data, tmp_path / f"model{expected}", words)
        out = tmp_path / f"out{expected}"
        arguments = [*small(model, data, out), *NOISE, "--per_device_train_batch_size", "64", "--eval_fraction", "0"]
        done = run_script(*arguments, "--max_steps", "2")
        assert done.returncode == 0 and f"The gradients of {2 * expected} authors were not finite" in done.stderr, done.stderr
        trained = AutoModelForCausalLM.from_pretrained(out)
        assert all(parameter.isfinite().all() for parameter in trained.parameters())
        assert read_report(out)["steps"] == 2


def test_non_finite_weights_stop_the_run_unsaved(checkpoint, comments, tmp_path):
    arguments = small(checkpoint, comments, tmp_path / "out", *NOISE, "--learning_rate", "1e38", "--optim", "sgd")
    done = run_script(*arguments, "--noise_multiplier", "100")
    assert done.returncode == 2 and "--learning_rate" in done.stderr and "not finite" in done.stderr, done.stderr
    assert latest_complete_checkpoint(tmp_path / "out") is None and "Traceback" not in done.stderr


def test_dead_data_loader_worker_ends_the_run(checkpoint, comments, tmp_path):
    arguments = small(checkpoint, comments, tmp_path / "out", *NOISE, "--dataloader_num_workers", "1")
    process = start(*arguments, *LONG)
    wait_for_steps(process, tmp_path / "out", 5)
    (worker,) = children(process.pid)
    os.kill(worker, signal.SIGKILL)
    status, stderr = wait_for_end(process)
    assert status == 2 and "--dataloader_num_workers" in stderr and "Traceback" not in stderr, stderr
    check_resumes(arguments, tmp_path / "out", PrivacyLedger(tmp_path / "out" / "privacy_ledger.jsonl").steps)


def test_second_run_in_the_folder_is_refused(checkpoint, comments, tmp_path):
    arguments = small(checkpoint, comments, tmp_path / "out", *NOISE)
    process = start(*arguments, *LONG)
    wait_for_steps(process, tmp_path / "out", 4)
    process.send_signal(signal.SIGSTOP)  # it keeps the folder, and takes no time from the others
    (script := tmp_path / "fine-tune-dp.py").write_text(
        f"import runpy, sys\nsys.path.insert(0, {str(ROOT)!r})\nimport author_dp.accounting.hash_chain as hash_chain\n"
        f"hash_chain.LOCK_SECONDS = 1\nrunpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    )
    for more in ([], RESUME):
        done = run_script(*arguments, *more, script=script)
        assert done.returncode == 2 and "in use by another run" in done.stderr, done.stderr
    process.send_signal(signal.SIGCONT)
    process.send_signal(signal.SIGTERM)
    assert wait_for_end(process)[0] == 143 and PrivacyLedger(tmp_path / "out" / "privacy_ledger.jsonl").steps >= 4
