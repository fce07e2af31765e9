"""Guard the output directory of a training: lock it, and void every guarantee in it if the mechanism fails."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from author_dp.accounting.budget import Budget
from author_dp.accounting.ledger import REPORT_NAME, PrivacyLedger
from author_dp.distributed import barrier
from author_dp.errors import MechanismError, UserError
from author_dp.files import write_json


@contextmanager
def lock_output_dir(budget: Budget) -> Iterator[None]:
    """Lock the output directory on the main process. All processes read the ledger first.

    Raises:
        UserError: if another run holds the lock, or wrote to the ledger since it was read.
    """
    barrier()
    if budget.plan.disable_dp or not budget.is_main_process:
        yield
        return
    ledger = budget.ledger
    known_steps = ledger.steps
    with ledger.locked():
        if ledger.steps != known_steps:
            raise UserError(
                f"--output_dir {ledger.path.parent}: another run wrote to it just now. Check what it wrote, then resume"
            )
        yield


@contextmanager
def failures_recorded(budget: Budget, write_card: Callable[[], None]) -> Iterator[None]:
    """Within, a MechanismError voids the guarantees of the output directory before it propagates.

    Args:
        write_card: rewrites the model card, if an earlier run left one: its guarantee does not hold.
    """
    try:
        yield
    except MechanismError as error:
        if budget.is_main_process:
            void_guarantee(budget.ledger, str(error))
        if (budget.ledger.path.parent / "README.md").exists():
            write_card()
        raise


def void_guarantee(ledger: PrivacyLedger, failure: str) -> None:
    """Record in the ledger, and in every report beside and below it, that nothing has a guarantee; main process only."""
    ledger.record_failure(failure)
    folder = ledger.path.parent
    void = dict.fromkeys(("epsilon", "epsilon_with_evaluation", "mu_gdp", "tpr_at_fpr"))
    # The hash of the failure's record: a ledger from which that record was removed is refused.
    void |= {"alarm": failure, "ledger_link": ledger.record_hashes[-1]}
    for path in [*folder.glob(REPORT_NAME), *folder.glob(f"*/{REPORT_NAME}")]:
        write_json(path, {**json.loads(path.read_text(encoding="utf-8")), **void})
