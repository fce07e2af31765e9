"""Log epsilon, and save complete, certified files that only their owner can read.

Guarantees: weights are saved with a privacy.json that names their hashes, and are those in memory, tensor by tensor. A checkpoint
counts only when all of it is on disk. No file holds the state of a random generator that protects authors. Weights that cannot be
saved in the output directory are saved beside it. (What may be uploaded: author_dp/outputs/uploads.py.)
"""

from pathlib import Path
from typing import Any, Optional

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedTokenizerBase
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_utils import align_special_tokens

from author_dp.accounting.budget import Budget
from author_dp.accounting.ledger import REPORT_NAME
from author_dp.accounting.output_dir import record_other_place
from author_dp.accounting.plan_text import format_plan, plan_utility_hint, plan_warnings
from author_dp.clipping.norm_stats import NormStatistics
from author_dp.data.splits import format_data_summary
from author_dp.errors import UserError, to_user_error
from author_dp.files import read_json_object, write_json
from author_dp.guards.model_check import check_trained_model_finite
from author_dp.guards.monitors import RunMonitors, sum_trained_weights
from author_dp.logs import get_logger
from author_dp.mechanism.fsdp import full_state_dict, load_sharded_weights
from author_dp.mechanism.secret_generators import SecretGenerators
from author_dp.models.sizes import model_sizes
from author_dp.models.training_marks import mark_as_trained
from author_dp.models.weights import write_hashed_weights
from author_dp.permissions import owner_only
from author_dp.training.base_trainer import LogicalBatchTrainer
from author_dp.training.checkpointing import atomic_checkpoint, mark_checkpoint_newest
from author_dp.training.console import format_devices
from author_dp.training.rescue import check_rescued, rescue_message, rescue_weights
from author_dp.training.resuming import check_ledger_covers_checkpoint, load_checkpoint_state
from author_dp.training.run_report import RunReport

logger = get_logger(__name__)


class CertifiedTrainer(LogicalBatchTrainer):
    """Trainer that saves checkpoints, models and metrics; `dp_utils.DPTrainer` adds the training.

    Attributes:
        folder: the output directory.
        full_shard: whether weights and optimizer state are sharded over the processes.
        made_with: options, model and data of the run, kept in its checkpoints.
        loader: the class that loads the result as it was trained, from outputs/rehearsal.py; None if unknown.
        generators: of random numbers inside the model. Set during training with privacy, when they are secret.
    """

    folder: Path
    budget: Budget
    run_report: RunReport
    full_shard: bool
    checkpoint: Optional[Path]
    made_with: dict[str, Any]
    monitors: RunMonitors
    norms: NormStatistics
    train_dataset: Any
    loader: Optional[str] = None
    generators: Optional[SecretGenerators] = None
    weight_sums: Optional[dict[str, int]] = None  # of the weights at the end of the training

    def check_run(self, full: bool = False) -> None:
        """Check sampling, clipping, noise and weights; with `full`, also frozen weights and the ledger file.

        Raises:
            MechanismError: if the mechanism is not what the ledger says.
            UserError: if weights are not finite.
        """
        self.monitors.test(full)
        check_trained_model_finite(self.model, self.state.global_step)

    def finish_run(self) -> None:
        """Check the run at its end, and remember which weights it has made."""
        self.check_run(full=True)
        self.weight_sums = sum_trained_weights(self.model)

    def check_weights_unchanged(self) -> None:
        """Raise UserError where other code has changed the weights since the training ended: no epsilon is known of them."""
        if self.weight_sums is not None and self.weight_sums != sum_trained_weights(self.model, self.weight_sums):
            raise UserError(
                "model of DPTrainer: the weights have changed since the training ended, so no epsilon is known of them. Save "
                "before you change or cast them; or save them with model.save_pretrained, without a guarantee"
            )

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Add the epsilon spent so far to every line, and public statistics to those of training."""
        if not self.plan.disable_dp:
            if "loss" in logs:
                self.check_run()
                logs |= {**self.norms.pop(), "noise_multiplier": self.plan.noise_multiplier}
            if self.args.process_index == 0:
                logs["epsilon"] = self.epsilon()
        with owner_only():
            super().log(logs, *args, **kwargs)

    def summary(self) -> str:
        """Return what the run will do and cost, for the log before training."""
        steps_before = load_checkpoint_state(self.checkpoint).global_step if self.checkpoint else 0
        steps, epsilon = self.budget.forecast(max(0, self.plan.steps - steps_before))
        offsets, sizes = self.train_dataset.offsets, model_sizes(self.model)
        devices = format_devices(self.args)
        return format_plan(self.budget.plan, offsets, *sizes, epsilon, self.budget.ledger.steps, steps, devices)

    def log_summary(self) -> None:
        """Log what the run will do and cost, and warn of likely mistakes."""
        data = self.run_report.data
        logger.info("\n".join([self.summary(), *(format_data_summary(data) if data else [])]))
        for warning in (*plan_warnings(self.budget.plan), plan_utility_hint(self.budget.plan)):
            if warning and not self.plan.disable_dp and self.is_world_process_zero():
                logger.warning(warning)

    def epsilon(self, more_steps: int = 0) -> float:
        """Return the epsilon of all steps in the ledger and `more_steps`; on rank 0 only."""
        return self.budget.epsilon(more_steps)

    def privacy_report(self) -> dict[str, Any]:
        """Return the contents of privacy.json; on rank 0 only."""
        if self.generators is None and not self.plan.disable_dp:  # not in training: another run may have written to the ledger
            self.budget.ledger.read()
        return self.run_report.to_dict(self.state.global_step)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Save as the Trainer does, completely or not at all."""
        self.check_run(full=True)
        with atomic_checkpoint(self.folder, self.args, self.state, self.made_with):
            super()._save_checkpoint(model, trial)

    def _save(self, output_dir: Optional[str] = None, state_dict: Optional[dict] = None) -> None:
        """Save model, tokenizer and the privacy.json of these weights."""
        if self.full_shard:
            state_dict = full_state_dict(self.model)
        if not self.args.should_save:
            return super()._save(output_dir, state_dict)
        adapter = isinstance(self.model, PeftModel)
        if adapter and self.run_report.adapter_base is None:  # never trained
            self.run_report.identify_base(self.model, None)
        folder, disable_dp = Path(output_dir or self.folder), self.plan.disable_dp
        if not disable_dp:
            self.check_weights_unchanged()
        try:
            if not disable_dp:
                record_other_place(self.folder, folder)
            with write_hashed_weights(folder, adapter, self.privacy_report, disable_dp), owner_only():
                super()._save(output_dir, state_dict)
                check_rescued(folder, self.model, state_dict)
        except Exception as error:  # of the system, transformers, safetensors, peft or a tokenizer
            rescued = rescue_weights(self, state_dict)
            raise (to_user_error(error) or error) if rescued is None else rescue_message(error, folder, rescued) from error

    def update_report(self) -> None:
        """Write privacy.json again, for the weights that are saved, when its other contents have changed; on rank 0 only."""
        path = self.folder / REPORT_NAME
        write_json(path, {**self.privacy_report(), "weights": read_json_object(path)["weights"]})

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        """Save a sharded optimizer's state as an unsharded one's."""
        if not self.full_shard:
            return super()._save_optimizer_and_scheduler(output_dir)
        state = getattr(self.optimizer, "optimizer", self.optimizer).full_optim_state()
        if self.args.should_save:
            torch.save(state, Path(output_dir) / OPTIMIZER_NAME)
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)  # type: ignore[union-attr]

    def _save_rng_state(self, output_dir: str) -> None:
        """Save the generators' states, unless they are secret, as they are with privacy."""
        if self.generators is None:
            super()._save_rng_state(output_dir)

    def _load_rng_state(self, checkpoint: Optional[str]) -> None:
        """Restore the generators' states, except with privacy: then each training has new ones."""
        if self.generators is None:
            super()._load_rng_state(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Optional[nn.Module] = None) -> None:
        """Load a checkpoint's weights, also into a sharded model."""
        if not self.full_shard:
            return super()._load_from_checkpoint(resume_from_checkpoint, model)
        load_sharded_weights(self.model, Path(resume_from_checkpoint))

    def continue_from_checkpoint(self) -> None:
        """Let the checkpoint from which this run starts be the newest: those of a branch that was left are older."""
        self.weight_sums = None
        if self.plan.disable_dp:  # with privacy, its first step does so
            mark_as_trained(self.model, None)
        if self.checkpoint is not None and self.args.should_save and self.checkpoint.resolve().parent == self.folder.resolve():
            mark_checkpoint_newest(self.checkpoint)

    def load_finished(self) -> None:
        """Load the model of a checkpoint at which the training has finished, with the special tokens that it was saved with."""
        logger.info(f"{self.checkpoint}: training already finished at this checkpoint; no privacy budget spent.")
        self.state = load_checkpoint_state(Path(str(self.checkpoint)))
        self._load_from_checkpoint(str(self.checkpoint))
        mark_as_trained(self.model, None if self.plan.disable_dp else self.budget.ledger)
        if isinstance(self.processing_class, PreTrainedTokenizerBase):  # as the Trainer does when it trains
            align_special_tokens(self.model, self.processing_class)
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint is not None:
            self._load_best_model()
        self.weight_sums = sum_trained_weights(self.model)

    def _load_best_model(self) -> None:
        """Load the best checkpoint, checked like a resumed one: trainer_state.json, which can be edited, names its folder."""
        if self.budget.is_main_process and not self.plan.disable_dp:
            check_ledger_covers_checkpoint(Path(str(self.state.best_model_checkpoint)), self.budget.ledger)
        super()._load_best_model()

    def save_metrics(self, *args, **kwargs) -> None:
        """Save metrics for the owner only."""
        with owner_only():
            super().save_metrics(*args, **kwargs)

    def save_state(self) -> None:
        """Save the Trainer's state, with its losses, for the owner only."""
        with owner_only():
            super().save_state()
