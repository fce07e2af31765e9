"""Say before a run what its settings will give: a table of settings that fit, the best one, and its command.

    python -m author_dp.plan --authors 10000 --target_epsilon 8 --parameters 135e6 --hours 2 --seconds_per_author 0.04
    python -m author_dp.plan --from_dry_run tried --hours 2 -- --sequence_len 64

Options after -- go into the command, as options of fine-tune-dp.py. It reads no data and spends nothing. What it predicts, and
where it has no ground to, is in accounting/loss_prediction.py and docs/planning.md.
"""

import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

from author_dp import cli
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
from author_dp.errors import UserError
from author_dp.models.lora import LoraArguments
from author_dp.outputs.planner_options import (
    PLACEHOLDERS,
    PlanArguments,
    PlannerCosts,
    planner_lora_options,
    planner_option_name,
    planner_options_of_dry_run,
    resolve_planner_options,
    without_planner_options,
)

ROWS = 5  # of the table: each takes two exact calibrations
MICROBATCH = 16  # authors in memory at once, in the command; it changes no result
BYTES_PER_TRAINED = 16  # float32: the weight, its clipped sum, and Adam's two moments
GIB = 2**30


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


def decided_options(task: PlanningTask, row: dict[str, Any]) -> dict[str, str]:
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
        "command": None if best is None else planner_command(decided_options(task, best), args, planner_lora_options(lora), more),
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
    if report["no_ground"]:
        notes.append(f"No prediction: {report['no_ground']}. Begin with docs/hyperparameters.md instead.")
    return "\n".join([*notes, *(["", f"* {report['command']}"] if report["command"] else [])])


def main(arguments: list[str]) -> None:
    place = arguments.index("--") if "--" in arguments else len(arguments)
    args, lora = cli.parse_options([PlanArguments, LoraArguments], arguments[:place])
    report = make_planner_report(args, lora, arguments[place + 1 :])
    print(json.dumps(report, indent=2) if args.json else format_planner_report(report))
