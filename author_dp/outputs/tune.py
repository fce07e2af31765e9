"""Search hyperparameters with one guarantee for the search: a random number of runs, of which only the best is released.

    python -m author_dp.tune --search learning_rate=1e-3,1e-2 lora_dim=4,16 --expected_runs 6 --target_epsilon 8 \\
        --release_eval_epsilon 0.5 -- [options of fine-tune-dp.py, with --output_dir OUT, without an epsilon]

Each run has settings drawn at random, and is scored by its released evaluation loss (loss_release.py). OUT gets what
`author_dp.publish` would copy of the best run, and a privacy.json with the epsilon of the search (accounting/tuning.py).

Guarantees: those of search.py, and of the theorem for what it does. OUT appears when the search has ended. All else is in
OUT-search, which its owner alone can read, and is deleted at the end. The same command resumes an interrupted search. Its
duration is not protected.
"""

import math
import sys
from collections.abc import Sequence
from datetime import timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from author_dp import cli
from author_dp.accounting.accountant import format_guarantee
from author_dp.accounting.ledger import ledger_event_of_run
from author_dp.accounting.loss_prediction import PredictionSetting, predicted_gain
from author_dp.accounting.run_planning import PlanningTask, find_planning_limits
from author_dp.accounting.tuning import SearchNoise, TuningRelease, calibrate_search
from author_dp.errors import SignalError, UserError
from author_dp.outputs.search import Search
from author_dp.outputs.tune_options import TuneArguments, split_script_options
from author_dp.training.loss_release import format_released_loss


def format_tune_cost(noise: SearchNoise, header: dict[str, Any], seconds: float, folder: Path) -> str:
    """Return what a search costs, before it begins: public values, and an estimate of the time."""
    count, single = noise.run_count, header["noise_multiplier"]
    most = count.quantile(Decimal("0.99"))
    hours = "" if math.isnan(seconds) else f", about {timedelta(seconds=round(seconds * most))}"
    prediction = format_tune_prediction(noise, header)
    lines = [
        f"runs              {count.expected:g} expected ({count.name}); with probability 99 % at most {most}{hours}",
        f"noise multiplier  {noise.noise_multiplier:.4f}, {noise.noise_multiplier / single:.2f} times the {single:.4f} of "
        "a single run at this epsilon",
        f"guarantee         {format_guarantee(noise.epsilon, header['delta'])}, for the entire search",
        *([f"predicted         {prediction}"] if prediction else []),
        f"private           {folder}: runs, logs and scores. Nothing of them is shown, and only the best is released, at the end",
    ]
    if math.isinf(count.eta):
        lines.append(
            f"no run            with probability {math.exp(-count.expected):.2g} nothing is released. That is the end, too: "
            "searching again would cost again"
        )
    return "\n".join(lines)


def format_tune_prediction(noise: SearchNoise, header: dict[str, Any]) -> str:
    """Return what the noise of a search costs by the planner's formula; empty where the formula has no ground."""
    batch, steps, authors = header["expected_batch_size"], header["steps"], header["num_authors"]
    gains = []
    for settings in filter(None, header["settings"] if authors is not None else []):
        sizes = (settings["parameters"], settings["trained_parameters"])
        is_lora = "lora" in settings
        if find_planning_limits(PlanningTask(authors, header["target_epsilon"], header["delta"], *sizes, is_lora), batch * steps):
            continue
        gains.append([
            predicted_gain(
                PredictionSetting(sigma, batch, steps, header["noise_bands"], settings["learning_rate"], *sizes, is_lora)
            )
            for sigma in (noise.noise_multiplier, header["noise_multiplier"])
        ])  # fmt: skip
    if not gains:
        return ""
    searched, alone = map(max, zip(*gains))
    return (
        f"by the planner's formula, the best of these settings gains {searched / alone:.0%} of what it would in a single run. A "
        "search pays only if you would choose worse than that without one"
    )


def check_same_tune_samples(search: Search) -> None:
    """Raise UserError if the data of an interrupted search are not those that it was drawn for, by one more dry run."""
    has_ended = len(search.plan["scores"]) == len(search.plan["runs"])
    if not has_ended and search.probe(most=1)[0]["samples"] != search.plan["samples"]:
        raise UserError(
            "--train_file, or another data option: the samples are not those that the search was drawn for. Give the same data "
            "to resume it"
        )


def tune(args: TuneArguments, words: Sequence[str]) -> None:
    """Search, from the first run or from where an interrupted call ended.

    Args:
        words: options of the script, with --output_dir.
    """
    search = Search(args, *split_script_options(words, args.grid))
    search.make_folder()
    lock = FileLock(search.folder / "lock", mode=0o600)
    try:
        with lock.acquire(timeout=0):
            search.open()
            if not search.plan:
                header, seconds = search.probe()
                event = ledger_event_of_run(header, header["steps"])
                release = TuningRelease(args.release_eval_epsilon, header["split"] is None)
                noise = calibrate_search(
                    args.run_counts, event.sample_rate, event.steps, args.target_epsilon, header["delta"], release
                )
                print(format_tune_cost(noise, header, seconds, search.folder), flush=True)
                search.draw(header, noise)
            else:
                check_same_tune_samples(search)
            search.run_all()
            report = search.end()
    except Timeout as error:
        raise UserError(f"--output_dir {search.out}: another call searches for it. Wait until it ends") from error
    if report is None:
        print("The search has ended and releases nothing. This, too, has spent its epsilon.")
    else:
        guarantee, loss = format_guarantee(report["epsilon"], report["delta"]), format_released_loss(report["evaluation_release"])
        print(f"{guarantee} for the search, {loss}, both public, saved to {search.out}")


def main(arguments: list[str]) -> None:
    place = arguments.index("--") if "--" in arguments else len(arguments)
    (args,) = cli.parse_options([TuneArguments], arguments[:place])
    try:
        tune(args, arguments[place + 1 :])
    except SignalError as error:
        print("author_dp.tune: interrupted; the same command resumes the search as it was drawn", file=sys.stderr)
        sys.exit(128 + error.number)
