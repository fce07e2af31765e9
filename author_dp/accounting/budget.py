"""Limit the steps of a run to its target epsilon, and record each step before its update.

Guarantees: no step is released that would take epsilon past the target, whoever calls the optimizer. Each step is in the ledger
before its update. Epsilon is that of all steps in the ledger, including those of earlier runs and lost ones.

Example:

    >>> budget = Budget(plan, PrivacyLedger(Path("scratch") / LEDGER_NAME), is_main_process=True)
    >>> with lock_output_dir(budget):
    ...     budget.start()
    ...     budget.record_step()
"""

import bisect
import math
import uuid
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any, Optional

from transformers import TrainerCallback

from author_dp.accounting.accountant import round_up
from author_dp.accounting.events import check_delta
from author_dp.accounting.ledger import COUNTS_NAME, PrivacyLedger, ledger_is_certified
from author_dp.accounting.plan import PrivacyPlan
from author_dp.distributed import broadcast
from author_dp.errors import UserError
from author_dp.files import write_json
from author_dp.logs import get_logger

logger = get_logger(__name__)


class Budget:
    """Steps, limit and epsilon of one run. The main process keeps the ledger; all processes know the limit.

    Args:
        plan: the parameters and the target of the run.
        ledger: of the output directory.
        is_main_process: whether this process writes the ledger.
    Attributes:
        steps: of this run; the ledger also has those of earlier runs.
        allowed_steps: the largest number of steps of this run under the target.
        by_metrics: the option by which evaluation metrics choose the model, if any.
        split: identifies the rule that holds authors out. Runs with one split never train on an author whom another holds out.
            None if authors may be on both sides.
    """

    def __init__(self, plan: PrivacyPlan, ledger: PrivacyLedger, is_main_process: bool):
        self.plan, self.ledger, self.is_main_process = plan, ledger, is_main_process
        self.steps = self._earlier_steps = 0
        self.allowed_steps: float = math.inf
        self.by_metrics: Optional[str] = None
        self.split: Optional[str] = None

    def start(self) -> None:
        """Compute how many steps the target allows, and write the ledger's header.

        Raises:
            UserError: if no step is allowed, delta promises nothing, or the mechanism of an earlier run failed.
        """
        self.steps = 0  # before epsilon is computed: the steps of an earlier training are another run's
        if self.plan.disable_dp:
            return
        if self.plan.noise_multiplier == 0:
            logger.warning("*** NO PRIVACY: --noise_multiplier 0 clips without noise. Epsilon is infinite. ***")
        if self.is_main_process:
            self.ledger.check_no_failure()
            if self.plan.noise_multiplier > 0:
                check_delta([*self.ledger.events, self.plan.event(self.plan.steps)], self.plan.delta)
            self.allowed_steps = self.affordable_steps(self.plan.steps)
            if self.allowed_steps >= 1:
                self._write_header()
        self.allowed_steps = broadcast(self.allowed_steps)
        self._earlier_steps = self.ledger.steps
        self._check_left(self.allowed_steps)

    def check_left(self) -> None:
        """Raise UserError if the target allows no further step. Collective."""
        if not self.plan.disable_dp:
            self._check_left(broadcast(self.affordable_steps(1) if self.is_main_process else 1))

    def _check_left(self, allowed_steps: float) -> None:
        if allowed_steps < 1:
            raise UserError(
                f"--target_epsilon {self.plan.target_epsilon}: used up by the steps in {self.ledger.path}. Raise it, or use the "
                "model of the newest checkpoint"
            )

    def _write_header(self) -> None:
        if self.plan.hide_counts:
            write_json(self.ledger.path.with_name(COUNTS_NAME), {"num_authors": self.plan.num_authors}, private=True)
        header = {
            **self.plan.to_public_dict(),
            "split": self.split,
            "by_metrics": self.by_metrics,
            "name": uuid.uuid4().hex,  # otherwise two runs with equal options would have equal records
            "started": datetime.now(timezone.utc).date().isoformat(),  # the time of day would disclose the duration of steps
            "versions": {name: version(name) for name in ("torch", "transformers", "opacus")},
        }
        self.ledger.start_run(header)

    def record_step(self) -> None:
        """Record a step before its update; raise RuntimeError if the target does not allow it."""
        if self.steps >= self.allowed_steps:
            raise RuntimeError(f"step {self.steps + 1} would exceed --target_epsilon {self.plan.target_epsilon}")
        if self.is_main_process:
            self.ledger.record_step()
        self.steps += 1

    def missing_steps(self) -> int:
        """Return how many steps of this run the ledger's file lacks; 0 on other processes than the main one."""
        return self._earlier_steps + self.steps - PrivacyLedger(self.ledger.path).steps if self.is_main_process else 0

    def record_release(self, release: dict[str, Any]) -> None:
        """Record a released evaluation loss (loss_release.py) with its epsilon; main process only."""
        with self.ledger.locked():
            self.ledger.record_release({**release, "split": self.split})

    def affordable_steps(self, steps: int) -> float:
        """Return how many of `steps` more steps the target allows, inf without a target; main process only."""
        target = self.plan.target_epsilon
        if target is None:
            return math.inf
        if self.epsilon(steps) <= target:
            return steps
        return bisect.bisect_left(range(1, steps), True, key=lambda more: self.epsilon(more) > target)

    def epsilon(self, more_steps: int = 0) -> float:
        """Return the epsilon of all steps in the ledger and `more_steps`; main process only."""
        if self.plan.disable_dp:
            return math.inf
        certificate, earlier = self.plan.certificate, self.ledger.runs_with_steps[: -1 if self.steps else None]
        if certificate and self.ledger.failure is None and ledger_is_certified(certificate, earlier, self.steps + more_steps):
            return round_up(certificate["epsilon"]) if earlier or self.steps + more_steps else 0.0
        return self.ledger.epsilon(self.plan.delta, self.plan.event(more_steps))

    def forecast(self, remaining_steps: int) -> tuple[int, float]:
        """Return the steps that the training will take, and epsilon at its end; epsilon is inf on other processes.

        Args:
            remaining_steps: the steps that are left in the plan.
        """
        if self.plan.disable_dp or not self.is_main_process:
            return remaining_steps, math.inf
        steps = int(min(remaining_steps, self.affordable_steps(remaining_steps)))
        return steps, self.epsilon(steps)


class StopAtTargetEpsilon(TrainerCallback):
    """Stop the training when the budget allows no further step."""

    follows = "steps"

    def __init__(self, budget: Budget):
        self.budget = budget

    def on_step_end(self, args, state, control, **kwargs):
        if self.budget.steps >= self.budget.allowed_steps and state.global_step < state.max_steps:
            logger.warning(f"Stopped at step {state.global_step} of {state.max_steps}: --target_epsilon is used up.")
            control.should_training_stop = True
