"""What privacy.json says of a run: its guarantee, settings, data, base model and audit. All of it is public.

A training that is called again at its end, with whatever options, reports the run that took its steps.
"""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, Optional

from peft import PeftModel

from author_dp.accounting.budget import Budget
from author_dp.accounting.ledger import REPORT_NAME
from author_dp.accounting.plan import plan_of
from author_dp.accounting.privacy_report import make_report
from author_dp.models.weights import check_same_base, describe_base
from author_dp.training.checkpointing import load_trainer_state


class RunReport:
    """The contents of privacy.json.

    Args:
        budget: of the run.
        settings: public options, for the model card.
        data: how texts became samples, from `data.splits.data_summary`; None where it is not known.
        base_model: the model that training starts from.
        secure_noise: as in PrivacyArguments.
    Attributes:
        audit: the result of canaries.
        adapter_base: the model under an adapter.
        finished: the privacy.json of a training that is at its end; None before.
    """

    def __init__(
        self, budget: Budget, settings: dict[str, Any], data: Optional[dict[str, Any]], base_model: Any, secure_noise: bool
    ):
        self.budget, self.plan, self.folder = budget, budget.plan, budget.ledger.path.parent
        self.settings, self.data, self.base_model, self.secure_noise = settings, data, base_model, secure_noise
        self.audit: Optional[dict[str, Any]] = None
        self.adapter_base: Optional[dict[str, Any]] = None
        self.finished: Optional[dict[str, Any]] = None

    def find_finished(self, checkpoint: Optional[Path]) -> None:
        """Where `checkpoint` is the end of the training, report the run that took its steps, whatever the options are now."""
        self.finished, self.audit, self.budget.plan = None, None, self.plan
        if not checkpoint or load_trainer_state(checkpoint).global_step < self.plan.steps:
            return
        self.finished, final = json.loads((checkpoint / REPORT_NAME).read_text()), self.folder / REPORT_NAME
        if final.exists() and (known := json.loads(final.read_text())).get("weights") == self.finished.get("weights"):
            self.finished = known  # with an audit, if there was one
        self.audit = self.finished.get("audit")
        if not self.plan.disable_dp:
            self.budget.ledger.read()  # another run may have written it since
            plan = plan_of(self.budget.ledger.last_run)
            if plan.hide_counts:  # then the header does not hold them, and nor will the report
                plan = replace(plan, num_authors=self.plan.num_authors, num_samples=self.plan.num_samples)
            self.budget.plan = plan

    def identify_base(self, model: Any, checkpoint: Optional[Path]) -> None:
        """Hash an adapter's base, once; a checkpoint must have the same one, and knows the model that training started from.

        Raises:
            UserError: for another base.
        """
        if isinstance(model, PeftModel):
            name = model.peft_config[model.active_adapter].base_model_name_or_path
            self.adapter_base = describe_base(name, getattr(model.get_base_model().config, "_commit_hash", None))
        if checkpoint:
            report = json.loads((checkpoint / REPORT_NAME).read_text())
            if not self.plan.disable_dp:
                check_same_base(self.adapter_base, report.get("adapter_base"))
            self.base_model = report.get("base_model")

    def to_dict(self, step: int) -> dict[str, Any]:
        """Return what privacy.json holds at a step of the training; on the first process only."""
        report = make_report(self.budget.plan, self.budget.ledger, step)
        if self.finished is not None and self.finished["disable_dp"] == self.plan.disable_dp:
            kept = {name: value for name, value in self.finished.items() if name != "weights"}
            return report | kept if self.plan.disable_dp else kept | report
        if not self.plan.disable_dp:
            report["secure_noise"] = self.secure_noise
        more = {
            "settings": self.settings,
            "data": self.data,
            "audit": self.audit,
            "adapter_base": self.adapter_base,
            "base_model": self.base_model,
        }
        return report | {name: value for name, value in more.items() if value}
