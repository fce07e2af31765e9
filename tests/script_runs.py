"""Scripts as programs, also by torch.distributed.run, in processes forked from one that has imported the libraries only.

What such a fork does not try: the imports, what the environment changes of them, and a hash seed of its own.
"""

import atexit
import contextlib
import gc
import multiprocessing
import os
import random
import runpy
import subprocess
import sys
import tempfile
import traceback
from multiprocessing import forkserver
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


def command(*arguments: str, processes: int = 0, script: Path = SCRIPT) -> list[str]:
    """Return what a user types; with `processes`, through torch.distributed.run."""
    return [sys.executable, *launcher(processes), str(script), *arguments]


def launcher(processes: int) -> list[str]:
    return ["-m", "torch.distributed.run", "--nproc_per_node", f"{processes}"] if processes else []


def leave_out_figures() -> None:
    """Drawing them is half the time of a run on a tiny model; tests/outputs/test_report.py draws them."""
    from author_dp.outputs import report

    report.draw_figures = lambda *_: {}


def main(arguments: tuple[str, ...], environment: dict[str, str], cwd: str, outputs: Path) -> None:
    """Be `python arguments` in a session of its own, which writes into outputs/1 and outputs/2."""
    gc.freeze()  # or collecting garbage would copy the memory that forks share
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    for descriptor in (1, 2):
        os.dup2(os.open(outputs / f"{descriptor}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), descriptor)
    random.seed()  # a fork has its parent's state
    np.random.seed()
    # torch read it before this; and its pool is made anew here, not by several threads at a time, which can fail after a fork
    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS") or torch.get_num_threads()))
    try:
        if arguments[0] == "-m":
            assert arguments[1] == "torch.distributed.run"
            launch(arguments[2:], outputs)
        else:
            leave_out_figures()
            sys.argv = list(arguments)
            sys.path.insert(0, str(Path(arguments[0]).parent))
            runpy.run_path(arguments[0], run_name="__main__")
    except Exception:
        traceback.print_exc()
        sys.exit(1)
    finally:
        atexit._run_exitfuncs()  # multiprocessing leaves them out


def launch(arguments: tuple[str, ...], outputs: Path) -> None:
    """Be torch.distributed.run, whose processes are forked, too."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.subprocess_handler import SubprocessHandler

    forkserver._forkserver.ensure_running = lambda: None  # it runs, but is no child of this process
    SubprocessHandler._popen = lambda _, typed, environment: Program(*typed[2:], environment=environment, outputs=outputs)
    run.main(arguments)


class Program:
    """As much of subprocess.Popen as torch.distributed.run and the tests of a script need, with both outputs as text.

    Args:
        arguments: of Python: a script with its own, or -m torch.distributed.run.
        outputs: the folder for them; a new one by default.
    """

    def __init__(
        self, *arguments: str, cwd: Path | None = None, environment: dict[str, str] | None = None, outputs: Path | None = None
    ):
        self.folder = None if outputs else tempfile.TemporaryDirectory()
        self.outputs = outputs or Path(self.folder.name)
        self.args = arguments
        self.process = FORKS.Process(
            target=main, args=(arguments, environment or dict(os.environ), str(cwd or Path.cwd()), self.outputs)
        )
        self.process.start()
        self.pid = self.process.pid
        atexit.register(self.process.kill)  # or a test that fails before would wait at the end for one that goes on

    def poll(self) -> int | None:
        return self.process.exitcode

    def send_signal(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, number)

    def output(self, descriptor: int) -> str:
        path = self.outputs / f"{descriptor}"
        return path.read_text() if path.exists() else ""

    def wait(self, timeout: float) -> subprocess.CompletedProcess:
        """Raises subprocess.TimeoutExpired where it does not end by itself in so many seconds; it is killed then."""
        self.process.join(timeout)
        if self.poll() is None:
            self.process.kill()
            raise subprocess.TimeoutExpired(self.args, timeout, self.output(1), self.output(2))
        return subprocess.CompletedProcess(self.args, self.poll(), self.output(1), self.output(2))
