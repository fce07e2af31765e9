"""Make the contents of privacy.json: guarantee, settings, data, base model and audit of a run. All of it is public.

If a finished training is called again, with any options, it reports the run that took its steps.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

from peft import PeftModel

from author_dp.accounting.budget import Budget
from author_dp.accounting.ledger import REPORT_NAME
from author_dp.accounting.plan import plan_of
from author_dp.accounting.privacy_report import PLAN_KEYS, make_privacy_report
from author_dp.errors import UserError
from author_dp.files import read_json_object
from author_dp.models.weights import check_same_base_weights, describe_base_weights
from author_dp.training.resuming import load_checkpoint_state
from author_dp.wording import format_count


class RunReport:
    """Contents of privacy.json.

    Args:
        budget: of the run.
        settings: public options, for the model card.
        data: how texts became samples, from `data.splits.data_summary`; None if unknown.
        base_model: description of the model that training starts from.
        secure_noise: as in PrivacyArguments.
    Attributes:
        audit: the result of the canaries.
        dry_run: whether the run takes two steps only, so that its model is not a finished one.
        adapter_base: description of an adapter's base model.
        finished: the privacy.json of a finished training; None before.
    """

    def __init__(
        self, budget: Budget, settings: dict[str, Any], data: Optional[dict[str, Any]], base_model: Any, secure_noise: bool
    ):
        self.budget, self.plan, self.folder = budget, budget.plan, budget.ledger.path.parent
        self.settings, self.data, self.base_model, self.secure_noise = settings, data, base_model, secure_noise
        self.dry_run = False
        self.audit: Optional[dict[str, Any]] = None
        self.adapter_base: Optional[dict[str, Any]] = None
        self.finished: Optional[dict[str, Any]] = None

    def adopt_finished_run(self, checkpoint: Optional[Path]) -> None:
        """Report the run that took the steps, if `checkpoint` is the end of the training.

        Raises:
            UserError: if `checkpoint` is beyond the end.
        """
        self.finished, self.audit, self.budget.plan = None, None, self.plan
        if not checkpoint or (steps := load_checkpoint_state(checkpoint).global_step) < self.plan.steps:
            return
        if steps > self.plan.steps:
            planned = format_count(self.plan.steps, "step")
            raise UserError(
                f"--max_steps or --num_train_epochs: {planned}, but {checkpoint} has {steps} already. Give at least as many, or "
                "resume from an earlier checkpoint by its name"
            )
        self.finished, final_path = read_json_object(checkpoint / REPORT_NAME), self.folder / REPORT_NAME
        final = read_json_object(final_path) if final_path.exists() else {}
        if final and final.get("weights") == self.finished.get("weights"):
            self.finished = final  # also holds the audit, if there was one
        self.audit = self.finished.get("audit")
        if not self.plan.disable_dp:
            self.budget.ledger.read()  # another run may have written to it since
            # Not the last run's: that may be a branch which was left, and made other weights.
            made = {name: self.finished[name] for name in (*PLAN_KEYS, "slots") if name in self.finished} | {"steps": steps}
            plan = plan_of({**self.budget.ledger.last_run, **made})
            if plan.hide_counts:  # then neither the header nor the report holds them
                plan = replace(plan, num_authors=self.plan.num_authors, num_samples=self.plan.num_samples)
            self.budget.plan = plan

    def identify_base(self, model: Any, checkpoint: Optional[Path]) -> None:
        """Hash an adapter's base once, and read from a checkpoint which model its training started from.

        Raises:
            UserError: if the checkpoint's adapter has another base.
        """
        if isinstance(model, PeftModel):
            name = model.peft_config[model.active_adapter].base_model_name_or_path
            self.adapter_base = describe_base_weights(name, getattr(model.get_base_model().config, "_commit_hash", None))
        if checkpoint:
            report = read_json_object(checkpoint / REPORT_NAME)
            if not self.plan.disable_dp:
                check_same_base_weights(self.adapter_base, report.get("adapter_base"))
                self.secure_noise = self.secure_noise and report.get("secure_noise") is True  # of all steps behind the weights
            self.base_model = report.get("base_model")

    def to_dict(self, step: int) -> dict[str, Any]:
        """Return the contents of privacy.json at a step of the training; on rank 0 only."""
        report = make_privacy_report(self.budget.plan, self.budget.ledger, step)
        if self.finished is not None and self.finished["disable_dp"] == self.plan.disable_dp:
            kept = {name: value for name, value in self.finished.items() if name != "weights"}
            return report | kept if self.plan.disable_dp else kept | report
        if not self.plan.disable_dp:
            report["secure_noise"] = self.secure_noise
        more = {
            "dry_run": self.dry_run,
            "settings": self.settings,
            "data": self.data,
            "audit": self.audit,
            "adapter_base": self.adapter_base,
            "base_model": self.base_model,
        }
        return report | {name: value for name, value in more.items() if value}
