"""fine-tune-dp.py as a program, in a process that is forked from one which has imported the libraries, and done nothing else.

What such a fork does not try: the imports, what the environment changes of them, and a hash seed of its own.
"""

import atexit
import contextlib
import multiprocessing
import os
import random
import runpy
import subprocess
import sys
import tempfile
import traceback
from pathlib import Path

import numpy as np
import torch

SCRIPT = Path(__file__).parent.parent / "fine-tune-dp.py"
PRIVACY = ["--target_epsilon", "8", "--per_sample_max_grad_norm", "1.0"]
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    "accelerate datasets opacus.accountants opacus.grad_sample pandas peft transformers.trainer transformers.models.auto "
    "transformers.models.gpt2.modeling_gpt2 transformers.models.gpt2.tokenization_gpt2".split()
)


def small(checkpoint, comments, folder, *more) -> list[str]:
    return [
        "--model_name", str(checkpoint), "--train_file", str(comments), "--output_dir", str(folder), "--sequence_len", "32",
        "--max_steps", "3", "--disable_tqdm", "True", "--max_eval_samples", "20", "--eval_fraction", "0.1", *more,
    ]  # fmt: skip


def run_here(monkeypatch, capfd, *arguments: str) -> tuple[int, str]:
    """Run the script in this process; return its exit status and what it wrote on stderr."""
    monkeypatch.setattr(sys, "argv", ["fine-tune-dp.py", *arguments])
    monkeypatch.setattr("author_dp.outputs.report.draw_figures", lambda *_: {})  # half the time of a run on a tiny model
    capfd.readouterr()
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except SystemExit as exit_:
        return exit_.code or 0, capfd.readouterr().err
    return 0, capfd.readouterr().err


def command(*arguments: str, processes: int = 0) -> list[str]:
    """Return what a user types; with `processes`, through torch.distributed.run."""
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", f"{processes}"] if processes else []
    return [sys.executable, *launcher, str(SCRIPT), *arguments]


def leave_out_figures() -> None:
    """Drawing them is half the time of a run on a tiny model; tests/outputs/test_report.py draws them."""
    from author_dp.outputs import report

    report.draw_figures = lambda *_: {}


def main(arguments: tuple[str, ...], environment: dict[str, str], cwd: str, outputs: Path) -> None:
    """Be `python fine-tune-dp.py arguments`, which writes into outputs/1 and outputs/2."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for descriptor in (1, 2):
        os.dup2(os.open(outputs / f"{descriptor}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    random.seed()  # a fork has its parent's state
    np.random.seed()
    # torch read it before this; and its pool is made anew here, not by several threads at a time, which can fail after a fork
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS") or torch.get_num_threads()))
    leave_out_figures()
    sys.argv = [str(SCRIPT), *arguments]
    sys.path.insert(0, str(SCRIPT.parent))
    try:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out


class Program:
    """As much of subprocess.Popen as the tests of this script need, with both outputs as text."""

    def __init__(self, *arguments: str, cwd: Path | None = None, environment: dict[str, str]):
        self.folder = tempfile.TemporaryDirectory()
        self.args = arguments
        settings = (arguments, environment, str(cwd or Path.cwd()), Path(self.folder.name))
        self.process = FORKS.Process(target=main, args=settings)
        self.process.start()
        self.pid = self.process.pid
        atexit.register(self.process.kill)  # or a test that fails before would wait at the end for one that goes on

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def output(self, descriptor: int) -> str:
        path = Path(self.folder.name) / f"{descriptor}"
        return path.read_text() if path.exists() else ""

    def wait(self, timeout: float) -> subprocess.CompletedProcess:
        """Raises subprocess.TimeoutExpired where it does not end by itself in so many seconds; it is killed then."""
        self.process.join(timeout)
        if self.poll() is None:
            self.process.kill()
            raise subprocess.TimeoutExpired(self.args, timeout, self.output(1), self.output(2))
        return subprocess.CompletedProcess(self.args, self.poll(), self.output(1), self.output(2))
