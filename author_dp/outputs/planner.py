"""Say before a run what its settings will give: a table of settings that fit, the best one, and its command.

    python -m author_dp.plan --authors 10000 --target_epsilon 8 --parameters 135e6 --hours 2 --seconds_per_author 0.04
    python -m author_dp.plan --from_dry_run tried --hours 2 -- --sequence_len 64

Options after -- go into the command, as options of fine-tune-dp.py. It reads no data and spends nothing. What it predicts, and
where it has no ground to, is in accounting/loss_prediction.py and docs/planning.md. `--from_dry_run` reads the files of a dry
run, whose times and memory come from private texts.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
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
from author_dp.hub_access import hub_is_reachable
from author_dp.models.lora import LoraArguments
from author_dp.outputs.planner_command import (
    PlannerCosts,
    options_of_planner,
    planner_command,
    planner_lora_options,
    read_dry_run_for_planner,
)
from author_dp.validation import check_exclusive, check_range, option

ROWS = 5  # of the table: each takes two exact calibrations
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
        for name in ("seconds_per_author", "model", "parameters"):  # the command would be of another model than the plan
            check_exclusive(self, "from_dry_run", name)
        if (self.trained_parameters or 0) > (self.parameters or 0):
            raise UserError("--trained_parameters: it is a part of --parameters, and at most as large. Give both")
        if self.seconds_per_author is not None and self.hours is None:
            raise UserError("--seconds_per_author: it limits nothing without --hours. Give --hours, too")
        if self.hours is not None and self.seconds_per_author is None and self.from_dry_run is None:
            raise UserError(
                "--hours: how many steps fit is unknown. Give --seconds_per_author (a step's time / its batch), or --from_dry_run"
            )


def resolve_planner_options(args: PlanArguments, lora: LoraArguments) -> tuple[PlanningTask, PlannerCosts]:
    """Return what is asked for, from the options and the files of the dry run.

    Raises:
        UserError: for what neither has, or a folder that holds no dry run.
    """
    found: dict[str, Any] = {}
    costs, sampled = PlannerCosts(), None
    if args.from_dry_run is not None:
        found, costs, sampled = read_dry_run_for_planner(Path(args.from_dry_run))
        if lora.enable_lora:
            raise UserError("--enable_lora: the dry run says what is trained. Leave it out, or make another dry run")
    elif args.trained_parameters is not None and not lora.enable_lora:
        raise UserError("--trained_parameters: without --enable_lora, all parameters are trained. Add it, or leave this out")
    authors, epsilon = args.authors or found.get("num_authors"), args.target_epsilon or found.get("target_epsilon")
    if authors is None or epsilon is None:
        missing = [name for name, value in (("--authors", authors), ("--target_epsilon", epsilon)) if value is None]
        raise UserError(f"{', '.join(missing)}: missing. Give {'it' if len(missing) == 1 else 'them'}, such as --authors 10000")
    parameters, trained = count_planner_parameters(args, lora, found)
    seconds = args.seconds_per_author or costs.seconds_per_author
    if args.hours is not None and seconds is not None:  # checked with the options
        sampled, costs = 3600 * args.hours / seconds, costs._replace(seconds_per_author=seconds)
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


# --- the table ------------------------------------------------------------------------------------------


def make_planner_rows(task: PlanningTask, costs: PlannerCosts) -> list[dict[str, Any]]:
    """Return the best setting of each of the best batch sizes, the best one first; by batch size without ground to predict."""
    settings, ground = planning_candidates(task), find_planning_limits(task)
    if not settings:
        raise UserError("--hours: not even the smallest batch fits eight times. Raise it, or lower --seconds_per_author")
    divided = [setting for setting in settings if setting.batch % costs.processes == 0]
    if not divided:
        raise UserError(f"--from_dry_run: {costs.processes} processes divide no batch that fits. Make it with another number")
    rows = [make_planner_row(task, setting, costs, not ground) for setting in divided[:ROWS]]
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


def make_planner_report(args: PlanArguments, lora: LoraArguments, more: Sequence[str]) -> dict[str, Any]:
    """Return what the planner prints: the task, rows, and the command of the best one."""
    task, costs = resolve_planner_options(args, lora)
    rows, command = make_planner_rows(task, costs), None
    if rows[0]["best"]:
        command = planner_command(options_of_planner(task, rows[0], costs), costs, args, planner_lora_options(lora), more)
    return {
        "task": task._asdict(),
        "no_ground": find_planning_limits(task) or None,
        "from_private_texts": args.from_dry_run is not None,
        "memory_is_measured": costs.peak is not None,
        "trained_is_estimated": lora.enable_lora and args.parameters is not None and args.trained_parameters is None,
        "rows": rows,
        "command": command,
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
    if report["command"] is None and not report["no_ground"]:
        notes.append("No command: the dry run was not one of fine-tune-dp.py. Set these options in your program.")
    if report["no_ground"]:
        notes.append(f"No prediction: {report['no_ground']}. Begin with docs/hyperparameters.md instead.")
    return "\n".join([*notes, *(["", f"* {report['command']}"] if report["command"] else [])])


def main(arguments: list[str]) -> None:
    place = arguments.index("--") if "--" in arguments else len(arguments)
    args, lora = cli.parse_options([PlanArguments, LoraArguments], arguments[:place])
    report = make_planner_report(args, lora, arguments[place + 1 :])
    print(json.dumps(report, indent=2) if args.json else format_planner_report(report))
