"""Make the command of a planned run: what the planner decided, the options of a dry run or placeholders, and what is added.

Guarantees: a run with this command has the noise, batch, steps and trained weights that the planner showed. Options that would
change them are refused; those of a dry run are replaced.
"""

import math
import shlex
from collections.abc import Collection, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple, Optional

from author_dp.accounting.run_planning import PlanningTask
from author_dp.errors import UserError
from author_dp.files import read_json_object
from author_dp.mechanism.adam_bc import SUPPORTED
from author_dp.models.lora import LoraArguments
from author_dp.outputs.html_page import STATISTICS_NAME
from author_dp.training.dry_run import MEASURED_NAME
from author_dp.validation import option_aliases

PROGRAM = "fine-tune-dp.py"
# The rest of the command: what the planner computes none of. Options after -- replace it.
PLACEHOLDERS = {
    "model_name": "MODEL", "train_file": "FILE", "output_dir": "OUT", "per_sample_max_grad_norm": "1.0",
    "lr_scheduler_type": "constant",
}  # fmt: skip
# Options that the planner has no place for: with them, a run would have another noise, length or loss than the table says.
UNPLANNED = (
    "sampling", "sample_rate", "noise_multiplier", "num_train_epochs", "samples_per_author", "optim", "disable_dp", "config",
)  # fmt: skip


class PlannerCosts(NamedTuple):
    """What a run costs beside privacy, and how it is started. None: unknown.

    Attributes:
        seconds_per_author: of a step, divided by its expected batch.
        peak: GiB of a process in the dry run, and its noise bands.
        processes: of the run; a batch is divided among them.
        at_once: authors in the memory of a process at once, at most. It changes no result.
    """

    seconds_per_author: Optional[float] = None
    peak: Optional[tuple[float, int]] = None
    processes: int = 1
    at_once: int = 16


def read_dry_run_for_planner(folder: Path) -> tuple[dict[str, Any], PlannerCosts, float]:
    """Return a dry run's public values, its costs, and how many authors the run that was asked for samples.

    Raises:
        UserError: where the folder holds no dry run, or one that the planner has no place for.
    """
    try:
        report, measured = read_json_object(folder / "privacy.json"), read_json_object(folder / MEASURED_NAME)
        settings = report["settings"]
        found = {name: report.get(name) for name in ("num_authors", "target_epsilon", "delta", "noise_bands")}
        found |= {"parameters": settings["parameters"], "trained_parameters": settings["trained_parameters"]}
        batch, peak = report["expected_batch_size"], (measured["peak_gib"], report["noise_bands"])
        costs = PlannerCosts(measured["seconds_per_step"] / batch, peak, report["world_size"], measured["authors_at_once"])
        sampled, samples, optimizer = measured["planned_steps"] * batch, report["samples_per_author"], settings["optim"]
    except (UserError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"--from_dry_run {folder}: it holds no dry run. Give the --output_dir of one (--dry_run)") from error
    if samples != 1 or optimizer not in SUPPORTED:
        found_option = f"--samples_per_author {samples}" if samples != 1 else f"--optim {optimizer}"
        raise UserError(f"--from_dry_run {folder}: it has {found_option}, which is not planned. Make a dry run without it")
    return found, costs, sampled


def planner_lora_options(lora: LoraArguments) -> list[str]:
    """Return the LoRA options that are given, as words of a command line."""
    words = []
    for one in fields(lora):
        value = getattr(lora, one.name)
        if value != one.default:
            values = value if isinstance(value, list) else [value]
            words += [f"--{one.name}", *([] if value is True else map(str, values))]
    return words


def planner_options_of_dry_run(folder: Path) -> Optional[list[str]]:
    """Return the options of a dry run's command that stay, from its private statistics; None where it was another program's.

    Raises:
        UserError: where a file has further options, which no check of the planner sees.
    """
    path = folder / STATISTICS_NAME
    words = shlex.split(read_json_object(path).get("command", "") if path.exists() else "")
    if Path(words[1] if len(words) > 1 else "").name != PROGRAM:
        return None
    if any(planner_option_name(word) == "config" for word in words):
        raise UserError(f"--from_dry_run {folder}: its command has --config. Make a dry run with the options in its command line")
    return without_planner_options(words[2:], {"dry_run", "output_dir"})


def planner_option_name(word: str) -> Optional[str]:
    """Return the name of the option that a word of a command line is; None if it is a value."""
    return word.partition("=")[0].removeprefix("--").replace("-", "_") if word.startswith("--") else None


def without_planner_options(words: Sequence[str], names: Collection[str]) -> list[str]:
    """Return the words of a command line without these options and their values. Abbreviations count as what they abbreviate."""
    kept, is_kept = [], True
    for word in words:
        if (name := planner_option_name(word)) is not None:
            is_kept = not any(option.startswith(name) for option in names)
        if is_kept:
            kept.append(word)
    return kept


def options_of_planner(task: PlanningTask, row: dict[str, Any], costs: PlannerCosts) -> dict[str, str]:
    """Return the options of a run that the planner decides."""
    share = row["expected_batch"] // costs.processes
    at_once = math.gcd(costs.at_once, share)
    return {
        "target_epsilon": f"{task.epsilon!r}",
        "target_delta": f"{task.delta!r}",
        "per_device_train_batch_size": f"{at_once}",
        "gradient_accumulation_steps": f"{share // at_once}",
        "max_steps": f"{row['steps']}",
        "noise_bands": f"{row['noise_bands']}",
        "learning_rate": f"{row['learning_rate']:g}",
    }


def check_planner_additions(more: Sequence[str], decided: Collection[str]) -> list[str]:
    """Return the names of the options after --; raise UserError for one that would make it another run than the planned one."""
    given = [name for word in more if (name := planner_option_name(word))]
    adapters = {one.name for one in fields(LoraArguments)} | set(option_aliases(LoraArguments))
    for name in given:
        if any(option.startswith(name) for option in decided):
            raise UserError(f"--{name}, after --: the planner itself sets it. Leave it out")
        if any(option.startswith(name) for option in adapters):
            raise UserError(f"--{name}, after --: it changes what is trained. Give it before --, or in the dry run")
        if any(option.startswith(name) for option in UNPLANNED):
            raise UserError(f"--{name}, after --: the run would not be the planned one. Leave it out")
    return given


def planner_command(
    decided: dict[str, str], costs: PlannerCosts, args: Any, lora: Sequence[str], more: Sequence[str]
) -> Optional[str]:
    """Return the command of a run: the decided options, those of the dry run, or placeholders, and what the caller adds.

    Args:
        args: planner.PlanArguments.
        lora: the LoRA options, as words.
        more: further words of the command line, which replace the others.
    Returns:
        None for the dry run of another program.
    Raises:
        UserError: for an option that would change the plan.
    """
    given = check_planner_additions(more, decided)
    words, defaults = [*lora, *more], PLACEHOLDERS | ({} if args.model is None else {"model_name": args.model})
    if args.from_dry_run is not None:
        if (kept := planner_options_of_dry_run(Path(args.from_dry_run))) is None:
            return None
        sources = {"train_file", "dataset_name"} if {"train_file", "dataset_name"} & set(given) else set()
        words = [*without_planner_options(kept, {*decided, *given, *sources, *UNPLANNED} - {"optim"}), *words]
        defaults = {"output_dir": "OUT"}
    present = {planner_option_name(word) for word in words}
    if "dataset_name" in present:
        defaults.pop("train_file", None)
    named = {name: value for name, value in defaults.items() if name not in present} | decided
    several = ["-m", "torch.distributed.run", "--nproc_per_node", str(costs.processes)] if costs.processes > 1 else []
    return shlex.join(["python", *several, PROGRAM, *(word for one in named.items() for word in (f"--{one[0]}", one[1])), *words])
