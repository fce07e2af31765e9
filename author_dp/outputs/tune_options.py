"""Options of a search, and a check of those that it passes on to the script.

Guarantees: the searched options are on a list: with any of their values a run costs the same. Options that the search decides
itself are refused, abbreviated ones too.
"""

import math
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from author_dp import cli
from author_dp.accounting.tuning import RunCount
from author_dp.errors import UserError
from author_dp.models.lora import LoraArguments
from author_dp.training.loss_release import LossReleaseArguments
from author_dp.validation import check_choice, check_range, option_aliases

LAWS = {"auto": (0.0, 1.0), "logarithmic": (0.0,), "geometric": (1.0,), "poisson": (math.inf,)}
# Options with which a run has the same sample rate, steps, noise multiplier and held-out authors as without.
SEARCHABLE = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "optim", "adam_beta1", "adam_beta2", "adam_epsilon",
    "adam_noise_correction", "lora_dim", "lora_alpha", "lora_dropout", "lora_target_modules", "per_sample_max_grad_norm",
    "samples_per_author",
)  # fmt: skip
ACCOUNTED = (
    "per_device_train_batch_size", "gradient_accumulation_steps", "max_steps", "num_train_epochs", "sample_rate", "noise_bands",
    "target_delta",
)  # fmt: skip
# What the search decides itself, or would publish more of a run than its best.
REFUSED = (
    "target_epsilon", "noise_multiplier", "release_eval_epsilon", "disable_dp", "dry_run", "part_of_search",
    "resume_from_checkpoint", "push_to_hub", "report_to", "audit_canaries", "allow_other_authors", "config",
)  # fmt: skip


@dataclass
class TuneArguments:
    """Options of python -m author_dp.tune; after -- follow those of the script."""

    search: list[str] = field(metadata={"help": "Grid of settings: name=value,value,... for each option that is searched."})
    expected_runs: float = field(metadata={"help": "Mean of the random number of runs; often 2 to 20."})
    target_epsilon: float = field(metadata={"help": "Epsilon of the entire search."})
    release_eval_epsilon: float = field(metadata={"help": "Epsilon of each run's score, its released evaluation loss."})
    law: str = field(
        default="auto",
        metadata={
            "help": "Law of the number of runs: auto is logarithmic or geometric, whichever needs less noise; with poisson there "
            "may be no run at all.",
            "choices": list(LAWS),
        },
    )
    launch: str = field(default=shlex.quote(sys.executable), metadata={"help": "How the script is started, as in a shell."})
    script: str = field(default="fine-tune-dp.py", metadata={"help": "The script."})
    keep_runs: bool = field(default=False, metadata={"help": "Keep all runs in OUT-search, which is private. None may be used."})

    def __post_init__(self):
        check_range("--target_epsilon", self.target_epsilon, "(0, inf)")
        check_choice("--law", self.law, LAWS)
        LossReleaseArguments(self.release_eval_epsilon)  # checks its range
        self.run_counts = [RunCount(self.expected_runs, eta) for eta in LAWS[self.law]]
        self.grid = parse_grid(self.search)


def parse_grid(words: Sequence[str]) -> dict[str, list[str]]:
    """Return the values of each searched option; raise UserError for what cannot be searched."""
    grid: dict[str, list[str]] = {}
    for word in words:
        name, _, values = word.partition("=")
        name = name.lstrip("-")
        if name in ACCOUNTED:
            raise UserError(f"--search {name}: it changes what a run costs, but all runs must cost the same. Fix it, after --")
        if name not in SEARCHABLE:
            raise UserError(f"--search {name}: not an option that can be searched. Choose among {', '.join(SEARCHABLE)}")
        choices = values.split(",")
        if name in grid or len(set(choices)) != len(choices) or any(not value or value.startswith("--") for value in choices):
            raise UserError(f"--search {word}: give each option once, with different values, like learning_rate=1e-3,1e-2")
        grid[name] = choices
    return grid


def split_script_options(words: Sequence[str], grid: dict[str, list[str]]) -> tuple[Path, list[str]]:
    """Return --output_dir and the other options of the script; raise UserError for those that the search decides.

    Abbreviations and other names count as what they stand for.
    """
    words, rest, out = cli.load_config_args(words), [], None
    decided = {name: name for name in (*REFUSED, *grid, "output_dir")}
    decided |= {alias: name for alias, name in option_aliases(LoraArguments).items() if name in decided}
    index = 0
    while index < len(words):
        name, equals, value = words[index].partition("=")
        if name in ("--output_dir", "--output-dir"):
            index += not equals
            out = value if equals else words[index] if index < len(words) else None
        elif name.startswith("--"):
            plain = name[2:].replace("-", "_")
            if refused := next((option for spelled, option in decided.items() if spelled.startswith(plain)), None):
                raise UserError(
                    f"{name}, after --: the search itself sets --{refused}. Leave it out, or write another option in full"
                )
            rest.append(words[index])
        else:
            rest.append(words[index])
        index += 1
    if not out:
        raise UserError("--output_dir: missing after --. Give the folder that gets the result of the search")
    return Path(out), rest
