"""Trainer that uploads public files only, and writes a model card of public values.

Guarantees: an upload holds what `author_dp/outputs/publish.py` copies of a folder, and nothing else.
"""

from pathlib import Path
from typing import Any, Optional

from transformers.trainer_utils import HubStrategy
from transformers.utils import PushInProgress

from author_dp.errors import UserError
from author_dp.outputs import rehearsal
from author_dp.outputs.guarantee import why_no_guarantee
from author_dp.outputs.model_card import CARD_NAME, model_card
from author_dp.outputs.publish import publish_to_hub
from author_dp.training.saving import CertifiedTrainer


class UploadingTrainer(CertifiedTrainer):
    """Replace the Trainer's uploads and its model card, which would publish private losses."""

    @property
    def hub_name(self) -> Optional[str]:
        """The hub repository that gets the checkpoints of this run, if any."""
        return f"https://huggingface.co/{self.hub_model_id}" if self.args.push_to_hub else None

    def rehearse(self) -> None:
        """Try what follows the last step, before the first one; raise UserError for an upload that would be refused then."""
        if self.args.push_to_hub and self.is_world_process_zero():
            if reason := "it is a dry run" if self.run_report.dry_run else why_no_guarantee(self.privacy_report()):
                raise UserError(f"--push_to_hub: there will be no guarantee to publish: {reason}. Leave it out")
        rehearsal.rehearse(self)

    def push_to_hub(  # type: ignore[override]
        self,
        commit_message: str = "End of training",
        blocking: bool = True,
        token: Optional[str] = None,
        revision: Optional[str] = None,
        private: Optional[bool] = None,
        **_: Any,
    ) -> Any:
        """Upload the public files of the output directory."""
        if self.hub_model_id is None:
            self.init_hf_repo(token=token, private=private)
        self.save_model(_internal_call=True)
        if self.is_world_process_zero():
            self._finish_current_push()
            return self._upload(self.folder, commit_message, token, revision, in_background=not blocking)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Upload the public files of a checkpoint; leave it out while the last upload is not finished."""
        if not self.is_world_process_zero() or self.args.hub_strategy == HubStrategy.END:
            return
        if self.push_in_progress is None or self.push_in_progress.is_done() or self.args.hub_always_push:
            self._finish_current_push()
            message = f"Training in progress, step {self.state.global_step}"
            job = self._upload(Path(checkpoint_folder), message, in_background=True)
            self.push_in_progress = PushInProgress([job])  # type: ignore[assignment, arg-type]

    def _upload(self, folder: Path, message: str, token: Any = None, revision: Any = None, *, in_background: bool) -> Any:
        token, revision = token or self.args.hub_token, revision or self.args.hub_revision
        return publish_to_hub(folder, str(self.hub_model_id), message, token, revision, in_background)

    def create_model_card(self, *args, **kwargs) -> None:
        """Write a card of public values instead of the Trainer's, which would show private metrics; none of a dry run."""
        if self.is_world_process_zero() and not self.run_report.dry_run:
            (self.folder / CARD_NAME).write_text(model_card(self.privacy_report()), encoding="utf-8")
