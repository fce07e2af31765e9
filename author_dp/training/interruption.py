"""Stop at a signal: after the step, with a checkpoint."""

import signal
import threading
import time
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback
from transformers.utils import logging

logger = logging.get_logger(f"transformers.{__name__}")


class StopOnSignal(TrainerCallback):
    """On SIGTERM or Ctrl-C, finish the step, save a checkpoint and stop; a second Ctrl-C acts at once.

    All processes stop after the same step, whichever of them got the signal. Transformers' own --enable_jit_checkpoint knows
    neither Ctrl-C nor several processes.
    """

    follows = "steps"  # and people
    SIGNALS = (signal.SIGINT, signal.SIGTERM)
    IMPATIENCE = 2.0  # seconds; a launcher hands the same signal on to its processes sooner than that, people do not

    def __init__(self):
        self.received, self.when, self.agreed = 0, 0.0, 0
        self.earlier: dict[int, Any] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        if threading.current_thread() is threading.main_thread():
            self.earlier = {number: signal.signal(number, self.receive) for number in self.SIGNALS}

    def receive(self, number: int, frame: Any) -> None:
        if not self.received:
            self.received, self.when = number, time.monotonic()
            logger.warning(f"{signal.Signals(number).name}: finishing the step, then saving a checkpoint.")
        elif number == signal.SIGINT and time.monotonic() - self.when > self.IMPATIENCE:
            raise KeyboardInterrupt

    def restore(self) -> None:
        for number, handler in self.earlier.items():
            signal.signal(number, handler)
        self.earlier = {}

    def on_step_end(self, args, state, control, **kwargs):
        self.agreed = self.received
        if dist.is_initialized():
            received = torch.tensor(self.received, device=args.device)
            dist.all_reduce(received, op=dist.ReduceOp.MAX)
            self.agreed = int(received)  # not `received`, which a signal may set just now
        if self.agreed:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
