"""Options of the audit by canaries, and the canaries that they ask for.

Example:

    >>> canaries = make_canaries(1000, "gradient", samples=2, tokens=128, vocab_size=50257, output_dir="out", resume=False)
    >>> trainer = DPTrainer(..., canaries=canaries)
"""

import os
import secrets
from dataclasses import dataclass
from pathlib import Path

from author_dp.distributed import broadcast
from author_dp.errors import UserError
from author_dp.files import read_json_object, write_json
from author_dp.guards.gradient_canaries import GradientCanaries
from author_dp.guards.text_canaries import TextCanaries
from author_dp.validation import check_choice, option

Canaries = TextCanaries | GradientCanaries | None

MIN_CANARIES = 10
KINDS = ("text", "gradient")
KEY_NAME = "_audit_key.json"  # in the output directory; the leading _ keeps it out of uploads to the hub


@dataclass
class AuditArguments:
    """Whether and how to audit the run."""

    audit_canaries: int = option(
        0, "Number of canary authors, about half of them included, for a lower bound on epsilon; 0: no audit."
    )
    audit_kind: str = option(
        "text",
        "Kind of canaries. text: shows what readers of the model could learn. gradient: does not change the model, and tests "
        "sampling, clipping and noise exactly.",
        KINDS,
    )

    def __post_init__(self):
        check_choice("--audit_kind", self.audit_kind, KINDS)
        self.check_given({"audit_kind"} if self.audit_kind == "gradient" else set())
        if self.audit_canaries != 0 and self.audit_canaries < MIN_CANARIES:
            raise UserError(
                f"--audit_canaries {self.audit_canaries}: fewer than {MIN_CANARIES} show nothing. Give 1000, or 0 for no audit"
            )

    def check_given(self, names: set[str]) -> None:
        """Raise UserError for a kind of canaries, given with its default, too, where there are none."""
        if "audit_kind" in names and not self.audit_canaries:
            raise UserError(f"--audit_kind {self.audit_kind}: it needs canaries. Add --audit_canaries 1000, or leave it out")


def make_canaries(
    number: int, kind: str, *, samples: int, tokens: int, vocab_size: int, output_dir: str, resume: bool
) -> Canaries:
    """Return the canaries of a run; None if `number` is 0. Collective.

    Args:
        number: of canaries, each included with probability 1/2.
        kind: text or gradient.
        samples, tokens: of a text canary: k, and tokens of each sample.
        vocab_size: of the model.
        output_dir: where their key is saved.
        resume: whether to use the canaries of the run there.
    """
    if not number:
        return None
    key = load_or_create_key(output_dir, resume)
    return GradientCanaries(number, key) if kind == "gradient" else TextCanaries(number, samples, tokens, vocab_size, key)


def load_or_create_key(output_dir: str, resume: bool) -> int:
    """Return 128 secret bits for the canaries, the same on all processes.

    They are saved in the output directory, readable for its owner only: a run that resumes needs the same canaries, and the
    audit can be repeated. The keys of noise and sampling are others, which never leave memory.

    Args:
        resume: whether to use the saved key, if there is one.
    """
    path = Path(output_dir) / KEY_NAME
    key = secrets.randbits(128)
    if int(os.environ.get("RANK", 0)) == 0:
        if resume and path.exists():
            key = read_json_object(path)["key"]
        write_json(path, {"key": key}, private=True)
    return broadcast(key)
