"""One search: draw it once, run what was drawn, release the best, delete the rest.

Guarantees: the number of runs and all settings are drawn before the first run, by the operating system's random bits. They are
never drawn again: an interrupted search resumes as it was drawn. A run that fails, takes more than its share of the budget, or
releases no loss is worse than all others, and is not replaced. All is in a folder that its owner alone can read. What leaves it
is the best run, when all have ended. Runs have their settings from a file in that folder, and equal command lines: other users
see these. All entries that a run adds are one folder deeper, as the number of links of a folder counts its subfolders for all.
"""

import math
import os
import re
import secrets
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any, Optional

import numpy as np

from author_dp.accounting.ledger import LEDGER_NAME, REPORT_NAME, PrivacyLedger, ledger_event_of_run
from author_dp.accounting.tradeoff import bounds_of_guarantee
from author_dp.accounting.tuning import RunCount, SearchNoise, TuningRelease, run_rdp
from author_dp.errors import SignalError, UserError
from author_dp.files import read_json_object, write_json
from author_dp.outputs.guarantee import format_guarantee_model, guarantee_covers_base, guarantee_in_search
from author_dp.outputs.privacy_statement import PUBLIC_KEYS, read_privacy_statement
from author_dp.outputs.publish import check_publish_target, copy_publishable
from author_dp.outputs.tune_options import TuneArguments
from author_dp.permissions import owner_only
from author_dp.training.resuming import SAMPLES_NAME

PLAN_NAME = "search.json"
OPTIONS_NAME = "options.json"  # of the run that is started; JSON is YAML
# What an interrupted call may leave.
BEFORE_THE_DRAW = {"lock", "runs", "probe", "probe.log", OPTIONS_NAME, f"{OPTIONS_NAME}.tmp", f"{PLAN_NAME}.tmp"}
SECONDS = re.compile(r"The full run will take about .*? \(([\d.e+-]+) s per step\)")


class Search:
    """A search in its private folder.

    Args:
        args: options of the search.
        out: the folder that gets the result.
        words: options of the script.
    Attributes:
        plan: contents of PLAN_NAME: what was drawn, and the scores so far; empty before.
    """

    def __init__(self, args: TuneArguments, out: Path, words: list[str]):
        self.args, self.out, self.words = args, out, words
        self.folder = Path(f"{out}-search")
        self.runs = self.folder / "runs"
        self.plan: dict[str, Any] = {}
        self.options = {
            "search": args.grid, "expected_runs": args.expected_runs, "target_epsilon": args.target_epsilon, "law": args.law,
            "release_eval_epsilon": args.release_eval_epsilon, "launch": args.launch, "script": args.script, "words": words,
        }  # fmt: skip

    def make_folder(self) -> None:
        """Create the folder, and make it private; raise UserError if it is in use for something else."""
        if not (self.folder / PLAN_NAME).exists():
            check_publish_target(self.folder, self.out)
            if {path.name for pattern in ("*", "runs/*") for path in self.folder.glob(pattern)} - BEFORE_THE_DRAW:
                raise UserError(
                    f"--output_dir {self.out}: {self.folder} is in use for something else. Choose another --output_dir"
                )
        with owner_only():
            self.runs.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o700)

    def open(self) -> None:
        """Read the plan of an interrupted search, if any. Only under the lock: another call may have drawn one, or ended it.

        Raises:
            UserError: if the folder belongs to another search, or to one that has ended.
        """
        path = self.folder / PLAN_NAME
        self.plan = read_json_object(path) if path.exists() else {}
        if self.plan.get("ended"):
            delete_search_runs(self.folder, self.plan)
            raise UserError(
                f"--output_dir {self.out}: its search has ended. A further search would add its own epsilon for the same "
                "authors: choose another --output_dir for it"
            )
        if self.plan and self.plan.get("options") != self.options:
            raise UserError(f"--output_dir {self.out}: {path} is of a search with other options. Give the same ones to resume it")

    def save(self) -> None:
        write_json(self.folder / PLAN_NAME, self.plan, private=True)

    # Before the first run.

    def probe(self, most: Optional[int] = None) -> tuple[dict[str, Any], float]:
        """Return the ledger's header of a run with its `samples` and the `settings` of all, and an estimate of its seconds.

        Dry runs try each value of the grid once, or `most` of them: what fails for the user's reasons fails here.
        """
        headers, settings_of_runs, seconds = [], [], math.nan
        for number in range(most or max(map(len, self.args.grid.values()))):
            settings = {name: values[number % len(values)] for name, values in self.args.grid.items()}
            folder, log, started = self.runs / "probe", self.runs / "probe.log", time.monotonic()
            shutil.rmtree(folder, ignore_errors=True)
            log.unlink(missing_ok=True)
            status = self.start(folder, settings, {"target_epsilon": self.args.target_epsilon, "dry_run": True}, log)
            output = log.read_text("utf-8", errors="replace")
            runs = PrivacyLedger(folder / LEDGER_NAME).runs
            if status or not runs:
                raise dry_run_error(settings, status, output)
            report = read_json_object(folder / REPORT_NAME) if (folder / REPORT_NAME).exists() else {}
            if not guarantee_covers_base(report):
                raise UserError(
                    f"--model_name: {format_guarantee_model(report['base_model'])}, and no search gives it one. Choose another"
                )
            settings_of_runs.append(report.get("settings"))
            headers.append({**runs[0], "samples": read_search_sample_hashes(folder)})
            if found := SECONDS.search(output):
                seconds = max(
                    0 if math.isnan(seconds) else seconds, time.monotonic() - started + float(found[1]) * runs[0]["steps"]
                )
        shutil.rmtree(folder, ignore_errors=True)
        log.unlink()
        check_equal_cost(headers)
        return headers[0] | {"settings": settings_of_runs}, seconds

    def draw(self, header: dict[str, Any], noise: SearchNoise) -> None:
        """Draw the number of runs and all of their settings, and write them: once in the life of a search."""
        event = ledger_event_of_run(header, header["steps"])
        grid = self.args.grid
        runs = [
            {"name": secrets.token_hex(8), "settings": {name: secrets.choice(values) for name, values in grid.items()}}
            for _ in range(noise.run_count.draw())
        ]
        self.plan = {
            "options": self.options,
            "runs": runs,
            "scores": [],  # of the runs that have ended: a loss, or None for a run that failed
            "noise_multiplier": noise.noise_multiplier,
            "run_epsilon": noise.run_epsilon,
            "epsilon": noise.epsilon,
            "delta": header["delta"],
            "noise_bands": header["noise_bands"],
            "accounted_sample_rate": event.sample_rate,
            "accounted_steps": event.steps,
            "both": header["split"] is None,
            "samples": header["samples"],
            "started": header["started"],
            "rdp": noise.rdp.tolist(),
            "tuning": {
                **describe_search_law(noise.run_count),
                "grid": grid,
                "score_epsilon": self.args.release_eval_epsilon,
                "single_noise_multiplier": header["noise_multiplier"],
            },
        }
        self.save()

    # Runs.

    def run_all(self) -> None:
        """Run what was drawn and has not ended yet, in the order of the draw."""
        for run in self.plan["runs"][len(self.plan["scores"]) :]:
            folder = self.runs / run["name"]
            if self.score(folder) is None:
                ledger = PrivacyLedger(folder / LEDGER_NAME)
                with ledger.locked():  # fails if an earlier call of this program left it running
                    resumes = ledger.steps > 0
                own = {"target_epsilon": self.plan["run_epsilon"], **({"resume_from_checkpoint": True} if resumes else {})}
                own["target_delta"] = self.plan["delta"]
                self.start(folder, run["settings"], own, folder.with_suffix(".log"))
            self.plan["scores"].append(self.score(folder))
            self.save()

    def start(self, folder: Path, settings: dict[str, str], own: dict[str, Any], log: Path) -> int:
        """Run the script in `folder`, and return its exit status; see `run_search_command`."""
        own |= {"output_dir": folder, "part_of_search": True, "report_to": "none"}
        own["release_eval_epsilon"] = self.args.release_eval_epsilon
        options = self.folder / OPTIONS_NAME
        write_json(options, {name: str(value) for name, value in {**settings, **own}.items()}, private=True)
        # What the dry runs chose for all runs: another number, as for less free memory, would cost more than a run's share.
        pinned = ["--noise_bands", str(self.plan["noise_bands"])] if self.plan else []
        command = [*shlex.split(self.args.launch), self.args.script, *self.words, *pinned, "--config", str(options)]
        return run_search_command(command, log)

    def score(self, folder: Path) -> Optional[float]:
        """Return the released loss of a finished run; None, the worst score, for a run that has none or broke its share.

        The share is a bound on the Renyi divergences of all that the run's ledger holds.
        """
        try:
            guarantee = read_privacy_statement(folder)
            if guarantee is None or guarantee["disable_dp"] or guarantee.get("alarm"):
                return None
            if not (guarantee["ledger_was_read"] and guarantee_in_search(guarantee) and guarantee_covers_base(guarantee)):
                return None
            if read_search_sample_hashes(folder) != self.plan["samples"]:
                return None
            ledger = PrivacyLedger(folder / LEDGER_NAME)
            splits = {record.get("split") for record in [*ledger.runs, *ledger.releases]}
            release = TuningRelease(self.args.release_eval_epsilon, len(splits) > 1 or None in splits, len(ledger.releases))
            if any(record["epsilon"] != release.epsilon for record in ledger.releases):
                return None
            if not np.all(run_rdp(ledger.events, release) <= np.array(self.plan["rdp"])):
                return None
            return guarantee["evaluation_release"]["loss"]
        except (UserError, KeyError, TypeError):  # the last two without a release, or with a torn one only
            return None

    # At the end.

    def end(self) -> Optional[dict[str, Any]]:
        """Release the best run, then delete what is secret; return the released privacy.json, None if no run has a score."""
        assert len(self.plan["scores"]) == len(self.plan["runs"])
        # Of equal scores the first is as good as any: runs are exchangeable.
        best = min((score, place) for place, score in enumerate([*self.plan["scores"], math.inf]) if score is not None)[1]
        report = None
        if best < len(self.plan["runs"]):
            folder = self.runs / self.plan["runs"][best]["name"]
            guarantee = read_privacy_statement(folder)
            assert guarantee is not None  # it had a score
            report = self.final_report(guarantee)
            released = self.out / REPORT_NAME
            if not (released.exists() and read_json_object(released) == report):  # otherwise an earlier call did it
                check_publish_target(self.folder, self.out)
                copy_publishable(folder, self.out, report)
        kept = self.plan if self.args.keep_runs else {}
        self.plan = {**kept, "ended": True, "keep_runs": self.args.keep_runs}
        self.save()
        delete_search_runs(self.folder, self.plan)
        return report

    def final_report(self, guarantee: dict[str, Any]) -> dict[str, Any]:
        """Return privacy.json of the best run, with the guarantee of the search in place of the run's."""
        left_out = ("alarm", "ledger_link", "epsilon_with_evaluation", "audit", "started")  # of one run
        report = {name: guarantee[name] for name in PUBLIC_KEYS if name in guarantee and name not in left_out}
        epsilon, delta = self.plan["epsilon"], self.plan["delta"]
        report |= {"epsilon": epsilon, "delta": delta, "target_epsilon": self.args.target_epsilon, "accountant": "rdp"}
        report["started"] = self.plan["started"]
        report["evaluation_release"] = {**report["evaluation_release"], "epsilon": epsilon}
        return report | bounds_of_guarantee(epsilon, delta) | {"tuning": self.plan["tuning"]}


def dry_run_error(settings: dict[str, str], status: int, output: str) -> UserError:
    """Return the error of a dry run that failed: with its first line that names one, or else its last line."""
    lines = [line for line in output.splitlines() if "error:" in line] or output.splitlines()[-1:] or ["no output"]
    return UserError(f"--search: a dry run with {format_search_settings(settings)} failed with status {status}: {lines[0]}")


def check_equal_cost(headers: list[dict[str, Any]]) -> None:
    """Raise UserError unless runs with these headers cost the same: the search is accounted as so many equal ones."""
    for name in ("sample_rate", "steps", "delta", "noise_bands", "noise_multiplier", "split", "samples"):
        if any(header[name] != headers[0][name] for header in headers):
            raise UserError(f"--search: its settings change {name}, but all runs must cost the same. Fix them, after --")


def describe_search_law(count: RunCount) -> dict[str, Any]:
    """Return how a search chose among its runs, for privacy.json."""
    has_gamma = math.isfinite(count.eta)
    return {
        "ended": True,
        "method": "best of a random number of runs, arXiv 2110.03620",
        "law": count.name,
        "expected_runs": count.expected,
        "eta": count.eta if has_gamma else None,
        "gamma": count.gamma if has_gamma else None,
    }


def read_search_sample_hashes(folder: Path) -> dict[str, Any]:
    """Return the hashes of the samples of the run in `folder`; raise UserError if it has not come so far."""
    return read_json_object(folder / SAMPLES_NAME)


def delete_search_runs(folder: Path, plan: dict[str, Any]) -> None:
    """Delete all but the plan, which says that the search has ended, unless runs are kept."""
    for entry in [] if plan["keep_runs"] else folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        elif entry.name not in (PLAN_NAME, "lock"):
            entry.unlink()


def run_search_command(command: list[str], log: Path) -> int:
    """Run a command with its output appended to `log`, which is private; return its exit status.

    Raises:
        SignalError: if a signal came, after the command has ended: a run saves a checkpoint.
        UserError: if it cannot be started.
    """
    received: list[int] = []
    started: list[subprocess.Popen] = []

    def forward(number: int, _: Any) -> None:
        if not received:
            for process in started:
                process.send_signal(signal.SIGTERM)
        received.append(number)

    handlers = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with open(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), "wb") as output, owner_only():
            # In a session of its own: Ctrl-C reaches it once, from here.
            started.append(
                subprocess.Popen(
                    command, stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
                )
            )
        if received:  # while it started
            started[0].send_signal(signal.SIGTERM)
        status = started[0].wait()
    except OSError as error:
        raise UserError(f"--launch {command[0]}: it cannot be started ({error.strerror}). Fix it") from error
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if received:
        raise SignalError(received[0])
    return status


def format_search_settings(settings: dict[str, str]) -> str:
    return " ".join(f"--{name} {value}" for name, value in settings.items())
