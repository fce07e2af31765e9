"""Run a function in several processes that are forked from this one, so that nothing is imported anew and planted bugs stay."""

import os
import socket
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from author_dp.errors import MechanismError, UserError


def in_processes(folder: Path, processes: int, work: Callable, *arguments: Any) -> list[Any]:
    """Return what `work(*arguments)` returns in each of the processes, which are connected by gloo.

    Raises:
        AssertionError: where a check in one of them fails, with what it said.
        RuntimeError: where one of them fails otherwise, or does not end.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(processes):
        if (child := os.fork()) == 0:
            status = 1
            try:
                os.environ.update(
                    RANK=f"{rank}", LOCAL_RANK=f"{rank}", WORLD_SIZE=f"{processes}", LOCAL_WORLD_SIZE=f"{processes}"
                )
                os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=f"{port}")
                torch.set_num_threads(torch.get_num_threads())  # torch's pool is made anew, not by several threads at a time
                dist.init_process_group("gloo")
                torch.save(work(*arguments), folder / f"{rank}.pt")
                dist.barrier()
                status = 0
            except BaseException as error:
                noticed = isinstance(error, AssertionError | pytest.fail.Exception | UserError | MechanismError)
                (folder / f"{rank}.failed").write_text(("noticed: " if noticed else "broken: ") + traceback.format_exc())
            finally:
                os._exit(status)
        children.append(child)
    wait_for(children)
    failures = [path.read_text() for path in sorted(folder.glob("*.failed"))]
    assert not any(text.startswith("noticed: ") for text in failures), "\n".join(failures)
    if failures:
        raise RuntimeError("\n".join(failures))
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(processes)]


def wait_for(children: list[int], seconds: float = 120.0) -> None:
    """Reap the children; once one has failed, the others have five seconds left."""
    deadline = time.monotonic() + seconds
    while children:
        for child in list(children):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                children.remove(child)
                if status:
                    deadline = min(deadline, time.monotonic() + 5)
        if time.monotonic() > deadline:
            for child in children:
                os.kill(child, 9)
                os.waitpid(child, 0)
            return
        time.sleep(0.02)
