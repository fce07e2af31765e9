"""Options of the planner, and what they say about the run: authors, guarantee, sizes of the model, time and memory.

`--from_dry_run` reads the files of a dry run, whose times and memory come from private texts. Everything else is public.
"""

import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Optional

from author_dp.accounting.accountant import MIN_DELTA
from author_dp.accounting.run_planning import PlanningTask
from author_dp.errors import UserError, first_line
from author_dp.hub_access import hub_is_reachable
from author_dp.models.lora import LoraArguments
from author_dp.outputs.html_page import STATISTICS_NAME
from author_dp.outputs.privacy_statement import read_statement_json
from author_dp.training.dry_run import MEASURED_NAME
from author_dp.validation import check_exclusive, check_range, option

# The rest of the command: what the planner computes none of. Options after -- replace it.
PLACEHOLDERS = {
    "model_name": "MODEL", "train_file": "FILE", "output_dir": "OUT", "per_sample_max_grad_norm": "1.0",
    "lr_scheduler_type": "constant",
}  # fmt: skip


@dataclass
class PlanArguments:
    """Options of python -m author_dp.plan; after -- follow further options of fine-tune-dp.py, for the command."""

    authors: Optional[int] = option(None, "Number of training authors.")
    target_epsilon: Optional[float] = option(None, "Epsilon of the run.")
    target_delta: Optional[float] = option(None, "Delta of the run. Default: 1 / authors.")
    model: Optional[str] = option(None, "Folder or hub name of the model; its sizes are read from its configuration.")
    parameters: Optional[float] = option(None, "Number of the model's parameters, such as 135e6, instead of --model.")
    trained_parameters: Optional[float] = option(
        None, "Number of trained parameters, for --enable_lora with --parameters. Default: estimated for a typical shape."
    )
    hours: Optional[float] = option(None, "Time for the steps of the run. Default: the time of the dry run's plan, or no limit.")
    seconds_per_author: Optional[float] = option(None, "Time of a step, divided by its expected batch.")
    from_dry_run: Optional[str] = option(
        None, "The --output_dir of a --dry_run, for what is not given here. Its times and memory come from private texts."
    )
    json: bool = option(False, "Print JSON instead of a table.")

    def __post_init__(self):
        check_range("--authors", self.authors, "[2, 1e12)")
        check_range("--target_epsilon", self.target_epsilon, "(0, inf)")
        check_range("--target_delta", self.target_delta, f"[{MIN_DELTA}, 1)", "Often it is 1e-5, or 1 / N")
        check_range("--parameters", self.parameters, "[1, 1e15)")
        check_range("--trained_parameters", self.trained_parameters, "[1, 1e15)")
        check_range("--hours", self.hours, "(0, 1e6)")
        check_range("--seconds_per_author", self.seconds_per_author, "(0, 1e6)")
        check_exclusive(self, "model", "parameters")
        check_exclusive(self, "from_dry_run", "seconds_per_author")
        if self.seconds_per_author is not None and self.hours is None:
            raise UserError("--seconds_per_author: it limits nothing without --hours. Give --hours, too")
        if self.hours is not None and self.seconds_per_author is None and self.from_dry_run is None:
            raise UserError(
                "--hours: how many steps fit is unknown. Give --seconds_per_author (a step's time / its batch), or --from_dry_run"
            )


@dataclass(frozen=True)
class PlannerCosts:
    """What a run costs beside privacy. None: unknown.

    Attributes:
        seconds_per_author: of a step, divided by its expected batch.
        peak: GiB of a process in the dry run, and its noise bands.
    """

    seconds_per_author: Optional[float] = None
    peak: Optional[tuple[float, int]] = None


def resolve_planner_options(args: PlanArguments, lora: LoraArguments) -> tuple[PlanningTask, PlannerCosts]:
    """Return what is asked for, from the options and the files of the dry run.

    Raises:
        UserError: for what neither has, or a folder that holds no dry run.
    """
    found, costs, sampled = (
        read_dry_run_for_planner(Path(args.from_dry_run)) if args.from_dry_run is not None else ({}, PlannerCosts(), None)
    )
    authors, epsilon = args.authors or found.get("num_authors"), args.target_epsilon or found.get("target_epsilon")
    if authors is None or epsilon is None:
        missing = [name for name, value in (("--authors", authors), ("--target_epsilon", epsilon)) if value is None]
        raise UserError(f"{', '.join(missing)}: missing. Give {'it' if len(missing) == 1 else 'them'}, such as --authors 10000")
    parameters, trained = count_planner_parameters(args, lora, found)
    seconds = args.seconds_per_author or costs.seconds_per_author
    if args.hours is not None and seconds is not None:  # checked with the options
        sampled, costs = 3600 * args.hours / seconds, PlannerCosts(seconds, costs.peak)
    delta = args.target_delta or (found.get("delta") if args.authors is None else None) or 1 / authors
    is_lora = lora.enable_lora or trained < parameters
    return PlanningTask(authors, epsilon, delta, parameters, trained, is_lora, sampled), costs


def count_planner_parameters(args: PlanArguments, lora: LoraArguments, found: dict[str, Any]) -> tuple[int, int]:
    """Return the numbers of all and of trained parameters."""
    if args.model is not None:
        return count_model_for_planner(args.model, lora)
    if args.parameters is None and "parameters" in found:
        return found["parameters"], found["trained_parameters"]
    if args.parameters is None:
        raise UserError("--model, --parameters: the model's size is missing. Give one of them")
    trained = args.trained_parameters or (
        estimate_planner_adapters(args.parameters, lora) if lora.enable_lora else args.parameters
    )
    return int(args.parameters), int(trained)


def estimate_planner_adapters(parameters: float, lora: LoraArguments) -> float:
    """Return about how many parameters adapters have, for a transformer of the usual shape.

    Its layers have 12 width^2 parameters each, and number width / 64. Rank (r + c) parameters adapt a matrix of r x c:
    18 width rank for all linear layers of a block, 4 width rank for two of attention, peft's choice for most models.
    """
    width = (parameters * 64 / 12) ** (1 / 3)
    return min(parameters, (18 if lora.lora_target_modules else 4) * width * lora.lora_dim * width / 64)


def count_model_for_planner(name: str, lora: LoraArguments) -> tuple[int, int]:
    """Return the numbers of all and of trained parameters of a model, from its configuration, without its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from author_dp.models.lora import add_lora_adapters
    from author_dp.models.quantization import model_sizes

    try:
        config = AutoConfig.from_pretrained(name, local_files_only=not Path(name).is_dir() and not hub_is_reachable())
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"--model {name}: it cannot be read ({first_line(error)}). Give a model's folder, or --parameters"
        ) from error
    total = model_sizes(model)[1]
    if (options := lora.to_options()) is None:
        return total, total
    with torch.device("meta"):
        model = add_lora_adapters(model, **options)
    return total, model_sizes(model)[0]


def read_dry_run_for_planner(folder: Path) -> tuple[dict[str, Any], PlannerCosts, float]:
    """Return a dry run's public values, its costs, and how many authors the run that was asked for samples."""
    try:
        report, measured = read_statement_json(folder / "privacy.json"), read_statement_json(folder / MEASURED_NAME)
        settings = report["settings"]
        found = {name: report.get(name) for name in ("num_authors", "target_epsilon", "delta", "noise_bands")}
        found |= {"parameters": settings["parameters"], "trained_parameters": settings["trained_parameters"]}
        batch = report["expected_batch_size"]
        costs = PlannerCosts(measured["seconds_per_step"] / batch, (measured["peak_gib"], report["noise_bands"]))
        return found, costs, measured["planned_steps"] * batch
    except (UserError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"--from_dry_run {folder}: it holds no dry run. Give the --output_dir of one (--dry_run)") from error


def planner_lora_options(lora: LoraArguments) -> list[str]:
    """Return the LoRA options that are given, as words of a command line."""
    words = []
    for one in fields(lora):
        value = getattr(lora, one.name)
        if value != one.default:
            values = value if isinstance(value, list) else [value]
            words += [f"--{one.name}", *([] if value is True else map(str, values))]
    return words


def planner_options_of_dry_run(folder: Path) -> list[str]:
    """Return the options of a dry run's command, from its private statistics; [] where they have none."""
    path = folder / STATISTICS_NAME
    command = read_statement_json(path).get("command", "") if path.exists() else ""
    return without_planner_options(shlex.split(command)[2:], {"dry_run", "output_dir"})


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
