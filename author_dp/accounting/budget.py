"""What a run may spend and what it has spent: its ledger, the steps that the target allows, and epsilon so far.

Promise: no step is released that would take epsilon past the target, whoever calls the optimizer; each is in the ledger before
its update. Epsilon is that of all steps in the folder's ledger, those of earlier runs and lost ones included.

Example:

    >>> budget = Budget(plan, PrivacyLedger(Path("scratch") / LEDGER_NAME), is_first_process=True)
    >>> with budget.lock_output_dir():
    ...     budget.start()
    ...     budget.record_step()
"""

import json
import math
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from importlib.metadata import version
from typing import Any, Optional

import numpy as np
from transformers import TrainerCallback
from transformers.utils import logging

from author_dp.accounting.accountant import accountant_of, epsilon_of
from author_dp.accounting.ledger import COUNTS_NAME, REPORT_NAME, PrivacyLedger
from author_dp.accounting.plan import PrivacyPlan
from author_dp.accounting.tradeoff import attack_bounds
from author_dp.distributed import barrier, broadcast
from author_dp.errors import MechanismError, UserError
from author_dp.files import write_json, write_private_json

logger = logging.get_logger(f"transformers.{__name__}")


class Budget:
    """The budget of one run. The first process keeps the ledger and knows epsilon; all know how many steps are allowed.

    Args:
        plan: what is promised.
        ledger: of the output folder.
        is_first_process: whether this is the process that writes.
    Attributes:
        steps: of this run, as opposed to those of earlier runs in the ledger.
        allowed_steps: of this run, under the target.
        by_metrics: the option by which evaluation metrics choose the model, if any.
        split: a name of the rule by which authors are held out; runs of one name never train on an author whom another holds out.
            None where authors may be on both sides.
    """

    def __init__(self, plan: PrivacyPlan, ledger: PrivacyLedger, is_first_process: bool):
        self.plan, self.ledger, self.is_first_process = plan, ledger, is_first_process
        self.steps = 0
        self._before = 0  # in the ledger when this run began
        self.allowed_steps: float = math.inf
        self.by_metrics: Optional[str] = None
        self.split: Optional[str] = None

    @contextmanager
    def lock_output_dir(self) -> Iterator[None]:
        """Lock the folder, for the first process; every process has looked into it before that one writes.

        Raises:
            UserError: where another run is in there, or was since the ledger was read.
        """
        barrier()
        if self.plan.disable_dp or not self.is_first_process:
            yield
            return
        known = self.ledger.steps
        with self.ledger.locked():
            if self.ledger.steps != known:
                raise UserError(
                    f"--output_dir {self.ledger.path.parent}: another run wrote to it just now; look what it is, then resume"
                )
            yield

    def start(self) -> None:
        """Work out how many steps the target allows, and write the ledger's header.

        Raises:
            UserError: where none is allowed.
        """
        plan = self.plan
        if plan.disable_dp:
            return
        if plan.noise_multiplier == 0:
            logger.warning("*** NO PRIVACY: --noise_multiplier 0 clips without noise. Epsilon is infinite. ***")
        if self.is_first_process:
            self.ledger.check_alarm()
            self.allowed_steps = self.affordable(plan.steps)
            if self.allowed_steps >= 1:
                versions = {name: version(name) for name in ("torch", "transformers", "opacus")}
                started = datetime.now(timezone.utc).date().isoformat()  # the time of day would tell how long steps take
                name = uuid.uuid4().hex  # so that no two runs have the same records, were they alike in all else
                if plan.hide_counts:
                    write_private_json(self.ledger.path.with_name(COUNTS_NAME), {"num_authors": plan.num_authors})
                header = {**plan.public(), "split": self.split, "by_metrics": self.by_metrics, "name": name, "started": started}
                self.ledger.start_run({**header, "versions": versions})
        self.steps, self.allowed_steps = 0, broadcast(self.allowed_steps)
        self._before = self.ledger.steps
        if self.allowed_steps < 1:
            raise UserError(
                f"--target_epsilon {plan.target_epsilon} is used up by the steps in {self.ledger.path}: raise it, or take the "
                "model of the newest checkpoint as it is"
            )

    def record_step(self) -> None:
        """Write a step ahead of its update; refuse one that the target does not allow."""
        if self.steps >= self.allowed_steps:
            raise RuntimeError(f"step {self.steps + 1} would exceed --target_epsilon {self.plan.target_epsilon}")
        if self.is_first_process:
            self.ledger.record_step()
        self.steps += 1

    def lacking(self) -> int:
        """Return how many steps of this run the ledger's file lacks; 0 on all processes but the first."""
        return self._before + self.steps - PrivacyLedger(self.ledger.path).steps if self.is_first_process else 0

    def record_release(self, release: dict[str, Any]) -> None:
        """Write a released evaluation loss (release.py) and what it spends; on the first process only."""
        with self.ledger.locked():
            self.ledger.record_release({**release, "split": self.split})

    def affordable(self, steps: int) -> float:
        """Return how many of `steps` more steps the target allows, all of them or inf without one; on the first process only."""
        target = self.plan.target_epsilon
        return math.inf if target is None else bisect_largest(steps, lambda more: self.epsilon(more) <= target)

    def epsilon(self, more_steps: int = 0) -> float:
        """Return the epsilon spent by all steps in the ledger and `more_steps`; on the first process only."""
        if self.plan.disable_dp or self.ledger.alarm is not None:
            return math.inf
        return epsilon_of([*self.ledger.spendings, self.plan.spending(more_steps)], self.plan.delta)

    def summary(self, sizes: tuple[int, int], offsets: np.ndarray, remaining_steps: int) -> str:
        """Return what will happen, for the log before training; epsilon in it on the first process only.

        Args:
            sizes: numbers of trained and of all parameters.
            offsets: (authors + 1,), from `data_utils.group_by_author`.
            remaining_steps: that the training will take, if the target allows them.
        """
        epsilon, steps = math.inf, remaining_steps
        if self.is_first_process and not self.plan.disable_dp:
            steps = int(min(steps, self.affordable(steps)))
            epsilon = self.epsilon(steps)
        return self.plan.summary(np.diff(offsets), *sizes, epsilon, self.ledger.steps, steps)

    def report(self, steps: int) -> dict[str, Any]:
        """Return what privacy.json holds; on the first process only.

        Args:
            steps: of the training, which are reported where there is no privacy and so no ledger.
        """
        if self.plan.disable_dp:
            return self.plan.report(math.inf, steps)
        spendings = self.ledger.spendings
        accountant = accountant_of(spendings, self.plan.delta)
        report = self.plan.report(self.epsilon(), self.ledger.steps, accountant, self.ledger.accounted_steps)
        if self.ledger.alarm is not None:
            report["alarm"] = self.ledger.alarm
        report |= attack_bounds(spendings if report["epsilon"] is not None else [], self.plan.delta)
        if self.ledger.releases:
            together = self.ledger.epsilon_with_releases(self.epsilon())
            report["evaluation_release"] = self.ledger.last_release
            report["epsilon_with_evaluation"] = together if math.isfinite(together) else None
        return {**report, "ledger_link": self.ledger.links[-1]}

    @contextmanager
    def alarm(self, write_card: Callable[[], None]) -> Iterator[None]:
        """Within, a MechanismError is noted in the folder before it goes on: there is no guarantee.

        Args:
            write_card: writes the model card anew, where there is one of an earlier run: it promises what does not hold.
        """
        try:
            yield
        except MechanismError as error:
            self.void_guarantee(str(error))
            if (self.ledger.path.parent / "README.md").exists():
                write_card()
            raise

    def void_guarantee(self, found: str) -> None:
        """Note in the ledger, and in every report of the folder, that there is no guarantee; on the first process only."""
        if not self.is_first_process:
            return
        self.ledger.record_failure(found)
        folder = self.ledger.path.parent
        # The link: a ledger from which the alarm is taken away is refused.
        void = {"epsilon": None, "epsilon_with_evaluation": None, "mu_gdp": None, "tpr_at_fpr": None}
        changed = {**void, "alarm": found, "ledger_link": self.ledger.links[-1]}
        for path in [*folder.glob(REPORT_NAME), *folder.glob(f"*/{REPORT_NAME}")]:
            write_json(path, {**json.loads(path.read_text()), **changed})


class StopAtTargetEpsilon(TrainerCallback):
    """Stop the training when the budget allows no further step."""

    follows = "steps"

    def __init__(self, budget: Budget):
        self.budget = budget

    def on_step_end(self, args, state, control, **kwargs):
        if self.budget.steps >= self.budget.allowed_steps and state.global_step < state.max_steps:
            logger.warning(f"Stopped at step {state.global_step} of {state.max_steps}: --target_epsilon is used up.")
            control.should_training_stop = True


def bisect_largest(limit: int, allowed: Callable[[int], bool]) -> int:
    """Return the largest number up to `limit` that is allowed, by bisection; 0 if none is."""
    low, high = 0, limit
    if allowed(high):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if allowed(middle) else (low, middle)
    return low
