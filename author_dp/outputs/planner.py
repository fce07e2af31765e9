"""Say before a run what its settings will give: a table of settings that fit, the best one, and its command.

    python -m author_dp.plan --authors 10000 --target_epsilon 8 --parameters 135e6 --hours 2 --seconds_per_author 0.04
    python -m author_dp.plan --from_dry_run tried --hours 2 -- --sequence_len 64

Options after -- go into the command, as options of fine-tune-dp.py. It reads no data and spends nothing. What it predicts, and
where it has no ground to, is in accounting/loss_prediction.py and docs/planning.md. `--from_dry_run` reads the files of a dry
run, whose times and memory come from private texts.
"""

import json
import shlex
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Optional

from author_dp import cli
from author_dp.accounting.accountant import MIN_DELTA
from author_dp.accounting.loss_prediction import INTERVAL, PredictionSetting, predicted_gain, prediction_interval
from author_dp.accounting.run_planning import (
    MAX_SAMPLED,
    PlanningTask,
    calibrate_planned_run,
    find_planning_limits,
    planning_candidates,
    planning_gain_without_privacy,
    planning_sum_error,
    planning_sum_error_ratio,
)
from author_dp.errors import UserError, first_line
from author_dp.files import read_json_object
from author_dp.hub_access import hub_is_reachable
from author_dp.models.lora import LoraArguments
from author_dp.outputs.html_page import STATISTICS_NAME
from author_dp.training.dry_run import MEASURED_NAME
from author_dp.validation import check_exclusive, check_range, option

# The rest of the command: what the planner computes none of. Options after -- replace it.
PLACEHOLDERS = {
    "model_name": "MODEL", "train_file": "FILE", "output_dir": "OUT", "per_sample_max_grad_norm": "1.0",
    "lr_scheduler_type": "constant",
}  # fmt: skip
ROWS = 5  # of the table: each takes two exact calibrations
MICROBATCH = 16  # authors in memory at once, in the command; it changes no result
BYTES_PER_TRAINED = 16  # float32: the weight, its clipped sum, and Adam's two moments
TOO_CLOSE = 0.02  # shares of the gain, far within the interval: the formula does not tell such rows apart
GIB = 2**30


# --- options and sizes ----------------------------------------------------------------------------------


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
    from author_dp.models.sizes import model_sizes

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
        report, measured = read_json_object(folder / "privacy.json"), read_json_object(folder / MEASURED_NAME)
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
    command = read_json_object(path).get("command", "") if path.exists() else ""
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


# --- the table ------------------------------------------------------------------------------------------


def make_planner_rows(task: PlanningTask, costs: PlannerCosts) -> list[dict[str, Any]]:
    """Return the best setting of each of the best batch sizes, the best one first; by batch size without ground to predict."""
    settings, ground = planning_candidates(task)[:ROWS], find_planning_limits(task)
    if not settings:
        raise UserError("--hours: not even the smallest batch fits eight times. Raise it, or lower --seconds_per_author")
    rows = [make_planner_row(task, setting, costs, not ground) for setting in settings]
    return [{**row, "best": row is rows[0] and not ground} for row in rows]


def make_planner_row(task: PlanningTask, setting: PredictionSetting, costs: PlannerCosts, has_ground: bool) -> dict[str, Any]:
    """Return a row of the table, with the noise of a run with this setting."""
    exact = setting._replace(noise_multiplier=calibrate_planned_run(task, setting))
    gain = predicted_gain(setting) if has_ground else None
    share = None if gain is None else prediction_interval(gain / planning_gain_without_privacy(task), task.is_lora)
    seconds = None if costs.seconds_per_author is None else costs.seconds_per_author * setting.batch * setting.steps
    return {
        "expected_batch": setting.batch,
        "steps": setting.steps,
        "noise_bands": setting.bands,
        "learning_rate": setting.learning_rate if has_ground else None,
        "noise_multiplier": exact.noise_multiplier,
        "noise_per_step": exact.noise_multiplier / setting.batch,
        "sum_error": planning_sum_error(exact),
        "sum_error_ratio": planning_sum_error_ratio(task, exact),
        **dict(zip(("share", "share_low", "share_high"), share or (None, None, None))),
        "gain": gain,
        "minutes": None if seconds is None else seconds / 60,
        "memory_gib": planner_memory(task, setting.bands, costs),
    }


def planner_memory(task: PlanningTask, bands: int, costs: PlannerCosts) -> float:
    """Return GiB of a process: the dry run's peak, for these bands; or that of weights, sums, moments and bands alone."""
    per_band = 4 * task.trained / GIB
    if costs.peak is not None:
        peak, measured_bands = costs.peak
        return peak + (bands - measured_bands) * per_band
    return (4 * (task.parameters - task.trained) + BYTES_PER_TRAINED * task.trained) / GIB + (bands - 1) * per_band


def options_of_planner(task: PlanningTask, row: dict[str, Any]) -> dict[str, str]:
    """Return the options of a run that the planner decides."""
    at_once = min(MICROBATCH, row["expected_batch"])
    return {
        "target_epsilon": f"{task.epsilon!r}",
        "target_delta": f"{task.delta!r}",
        "per_device_train_batch_size": f"{at_once}",
        "gradient_accumulation_steps": f"{row['expected_batch'] // at_once}",
        "max_steps": f"{row['steps']}",
        "noise_bands": f"{row['noise_bands']}",
        "learning_rate": f"{row['learning_rate']:g}",
    }


def planner_command(decided: dict[str, str], args: PlanArguments, lora: Sequence[str], more: Sequence[str]) -> str:
    """Return the command of a run: the decided options, those of the dry run, or placeholders, and what the caller adds.

    Args:
        lora: the LoRA options, as words.
        more: further words of the command line, which replace the others.
    Raises:
        UserError: for an option that the planner decides.
    """
    given = [name for word in more if (name := planner_option_name(word))]
    if clash := [name for name in given if any(option.startswith(name) for option in decided)]:
        raise UserError(f"--{clash[0]}, after --: the planner itself sets it. Leave it out")
    words = [] if args.from_dry_run is None else planner_options_of_dry_run(Path(args.from_dry_run))
    words = without_planner_options(words, {*decided, *given, "num_train_epochs", "sample_rate", "noise_multiplier"})
    words = [*words, *(lora if not words else []), *more]
    defaults = PLACEHOLDERS | ({} if args.model is None else {"model_name": args.model})
    present = {planner_option_name(word) for word in words}
    named = {name: value for name, value in defaults.items() if name not in present} | decided
    return shlex.join(["python", "fine-tune-dp.py", *(word for one in named.items() for word in (f"--{one[0]}", one[1])), *words])


def make_planner_report(args: PlanArguments, lora: LoraArguments, more: Sequence[str]) -> dict[str, Any]:
    """Return what the planner prints: the task, rows, and the command of the best one."""
    task, costs = resolve_planner_options(args, lora)
    rows = make_planner_rows(task, costs)
    best = rows[0] if rows[0]["best"] else None
    return {
        "task": task._asdict(),
        "no_ground": find_planning_limits(task) or None,
        "from_private_texts": args.from_dry_run is not None,
        "memory_is_measured": costs.peak is not None,
        "trained_is_estimated": lora.enable_lora and args.parameters is not None and args.trained_parameters is None,
        "rows": rows,
        "command": best and planner_command(options_of_planner(task, best), args, planner_lora_options(lora), more),
    }


def format_planner_number(value: Optional[float], digits: str) -> str:
    return "-" if value is None else format(value, digits)


def format_planner_report(report: dict[str, Any]) -> str:
    """Return the report as text."""
    task, rows = PlanningTask(**report["task"]), report["rows"]
    head = ("", "batch", "steps", "bands", "rate", "noise", "noise/B", "sum error", "(ratio)", "share kept", "minutes", "GiB")
    lines: list[tuple[str, ...]] = [head]
    for row in rows:
        share = "-" if row["share"] is None else f"{row['share']:.0%} ({row['share_low']:.0%} to {row['share_high']:.0%})"
        cells = [
            f"{row['expected_batch']:,}",
            f"{row['steps']:,}",
            f"{row['noise_bands']}",
            format_planner_number(row["learning_rate"], "g"),
        ]
        cells += [f"{row['noise_multiplier']:.4f}", f"{row['noise_per_step']:.2g}", f"{row['sum_error']:.2g}"]
        cells += [
            f"({row['sum_error_ratio']:.2f})",
            share,
            format_planner_number(row["minutes"], ".0f"),
            format_planner_number(row["memory_gib"], ".1f"),
        ]
        lines.append(("*" if row["best"] else "", *cells))
    widths = [max(map(len, column)) for column in zip(*lines)]
    table = "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in lines)
    trained = f"{task.trained:,} of {task.parameters:,} parameters trained"
    notes = [f"{task.num_authors:,} authors, epsilon {task.epsilon:g} at delta {task.delta:.2g}, {trained}", "", table, ""]
    notes.append(f"share kept: of the gain without privacy in the same time; in brackets {INTERVAL:.0%} intervals")
    notes.append("sum error: of the summed updates, per coordinate in clip norms; in brackets relative to independent noise")
    if task.max_sampled is not None and task.max_sampled > MAX_SAMPLED:
        notes.append(f"There is time for more, but nothing longer than {MAX_SAMPLED:,} authors in all batches was measured.")
    if report["trained_is_estimated"]:
        notes.append(
            "trained parameters: estimated for a typical shape; give --trained_parameters or --model for the exact number"
        )
    if not report["memory_is_measured"]:
        notes.append("GiB: weights, clipped sums, Adam's moments and noise bands; activations come on top")
    if report["from_private_texts"]:
        notes.append("Minutes and GiB come from the dry run, so from private texts: do not publish them.")
    if task.is_lora and not report["no_ground"]:
        notes.append("LoRA was not swept: its predictions were 0.19 to 0.52 too high where they were checked (docs/planning.md).")
    shares = [row["share"] for row in rows if row["share"] is not None]
    if len(shares) > 1 and max(shares) - min(shares) < TOO_CLOSE:
        notes.append(
            "All rows are predicted alike: take a measured setting (docs/hyperparameters.md), or the one with the least memory."
        )
    if report["no_ground"]:
        notes.append(f"No prediction: {report['no_ground']}. Begin with docs/hyperparameters.md instead.")
    return "\n".join([*notes, *(["", f"* {report['command']}"] if report["command"] else [])])


def main(arguments: list[str]) -> None:
    place = arguments.index("--") if "--" in arguments else len(arguments)
    args, lora = cli.parse_options([PlanArguments, LoraArguments], arguments[:place])
    report = make_planner_report(args, lora, arguments[place + 1 :])
    print(json.dumps(report, indent=2) if args.json else format_planner_report(report))
