"""Stop training at a signal, after the current step and with a checkpoint."""

import signal
import threading
import time
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from author_dp.logs import get_logger

logger = get_logger(__name__)


class StopOnSignal(TrainerCallback):
    """On SIGTERM or Ctrl-C, finish the step, save a checkpoint and stop; a second Ctrl-C stops at once.

    All processes stop after the same step, whichever of them received the signal. Transformers' --enable_jit_checkpoint supports
    neither Ctrl-C nor several processes.

    Attributes:
        received: the first signal of this process; 0 if none.
        synced_signal: the signal after which all processes stop; 0 if none.
    """

    follows = "steps"  # not metrics; signals come from people
    SIGNALS = (signal.SIGINT, signal.SIGTERM)
    SECOND_SIGINT_DELAY = 2.0  # seconds; a launcher forwards the same signal sooner than a person sends a second one

    def __init__(self):
        self.received, self.received_at, self.synced_signal = 0, 0.0, 0
        self.previous_handlers: dict[int, Any] = {}

    def on_train_begin(self, args, state, control, **kwargs):
        if threading.current_thread() is threading.main_thread():
            self.previous_handlers = {number: signal.signal(number, self.receive) for number in self.SIGNALS}

    def receive(self, number: int, frame: Any) -> None:
        """Handle a signal: note the first one; raise KeyboardInterrupt at a later SIGINT."""
        if not self.received:
            self.received, self.received_at = number, time.monotonic()
            logger.warning(f"{signal.Signals(number).name}: finishing the step, then saving a checkpoint.")
        elif number == signal.SIGINT and time.monotonic() - self.received_at > self.SECOND_SIGINT_DELAY:
            raise KeyboardInterrupt

    def restore(self) -> None:
        """Restore the signal handlers of before the training."""
        for number, handler in self.previous_handlers.items():
            signal.signal(number, handler)
        self.previous_handlers = {}

    def on_step_end(self, args, state, control, **kwargs):
        self.synced_signal = self.received
        if dist.is_initialized():
            received = torch.tensor(self.received, device=args.device)
            dist.all_reduce(received, op=dist.ReduceOp.MAX)
            self.synced_signal = int(received)  # a signal may change self.received at any time
        if self.synced_signal:
            control.should_save = control.should_training_stop = True
            control.should_evaluate = False
