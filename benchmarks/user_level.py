"""What does author-level privacy cost on real text of many authors, beside what people do instead? One row, one command.

python benchmarks/real_model.py model SmolLM2-135M-Instruct             # the model, roles and commits: see that file
python benchmarks/user_level.py run CORPUS ROW ... [--model_name FOLDER] [--data FILE] [sizes] [options of fine-tune-dp.py]
python benchmarks/user_level.py results                                 # the table into docs/results.md, also what is missing
python benchmarks/user_level.py rows                                    # what can be asked for

`run` trains once with fine-tune-dp.py, evaluates, and adds its row to user_level.jsonl beside this file; a row that is there is
not repeated. A fifth of the authors is held out, by a hash of each. Made-up authors wrote a code in 100 texts each, as in
memorization.py. The attack on membership is a threshold on an author's loss less that of the model before training.
"""

import argparse
import json
import math
import resource
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterable
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from attacks import clopper_pearson, evaluate, evaluate_base, promise_to_authors, rate_at_threshold, summarize
from common import ROOT, cached, fine_tune, format_head, format_row, main, option, print_head, print_row, table
from corpora import Corpus, make_corpus, read_rows

from author_dp.accounting.tradeoff import bounds_of_guarantee

CACHE, PAGE = Path(__file__).with_suffix(".jsonl"), ROOT / "docs" / "results.md"
BEGIN, END = "<!-- user_level.py results: begin -->\n", "<!-- user_level.py results: end -->\n"
DELTA = 1e-5  # about 1 / (10 authors), see --target_delta in docs/hyperparameters.md

# --- rows -----------------------------------------------------------------------------------------------------

LORA = "--enable_lora --lora_dim 8 --lora_alpha 16 --lora_target_modules all-linear"
COMMON = "--lr_scheduler_type constant --eval_fraction 0 --save_strategy no --log_level warning --disable_tqdm True"
GUIDE = f"--per_device_train_batch_size 16 --gradient_accumulation_steps 16 --num_train_epochs 3 --learning_rate 4e-3 {LORA}"
RATES = {"demo": {"LoRA": "1e-2", "full": "1e-2"}, "commits": {"LoRA": "2e-3", "full": "2e-4"}}
RATES["roles"] = RATES["commits"]


class Row(NamedTuple):
    title: str
    kind: str = ""  # LoRA or full: its learning rate, batch and steps; empty: those of its own options
    privacy: str = "--disable_dp"
    unit: str = "author"  # the column that is the privacy unit


def private(epsilon: int, bands: str = "auto") -> str:
    return f"--target_epsilon {epsilon} --target_delta {DELTA:g} --per_sample_max_grad_norm 1.0 --noise_bands {bands}"


ROWS = {
    "before": Row("before training"),
    "none": Row("without privacy, LoRA", "LoRA"),
    "lora-8": Row("author level, epsilon 8, LoRA", "LoRA", private(8)),
    "text-8": Row("per text, epsilon 8, LoRA", "LoRA", private(8, "1"), "text"),
    "lora-2": Row("author level, epsilon 2, LoRA", "LoRA", private(2)),
    "lora-1": Row("author level, epsilon 1, LoRA", "LoRA", private(1)),
    "none-full": Row("without privacy, full", "full"),
    "full-8": Row("author level, epsilon 8, full", "full", private(8)),
    "guide": Row("the guide's start, epsilon 8", "", f"{GUIDE} {private(8)}"),
    "planner": Row("the planner's pick (the options that `python -m author_dp.plan` prints)", "", private(8)),
}
EVERY_ROW = ("demo/model", "SmolLM2-135M-Instruct")  # models that all rows are of; others have a few
BASELINES = {"LoRA": "none", "full": "none-full", "": "none"}  # of the share of the gain


def options_of(row: Row, corpus: str, args: argparse.Namespace) -> str:
    """Return the options of fine-tune-dp.py that make the row, without files."""
    sizes = ""
    if row.kind:
        at_once = min(args.at_once, args.authors)
        batch = f"--per_device_train_batch_size {at_once} --gradient_accumulation_steps {args.authors // at_once}"
        sizes = f"{batch} --max_steps {args.steps} --learning_rate {RATES[corpus][row.kind]} {LORA if row.kind == 'LoRA' else ''}"
    parts = (f"--sequence_len {args.tokens}", sizes, f"--author_column {row.unit}", row.privacy, COMMON, *args.rest)
    return " ".join(" ".join(parts).split())


# --- one row -------------------------------------------------------------------------------------------------


def processor_seconds() -> float:
    """Return the processor time of this process, and of those that it waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(one.ru_utime + one.ru_stime for one in used)


def train_and_evaluate(key: dict[str, Any], *, corpus: Corpus, model: Path, base: Path) -> dict[str, Any]:
    """Return the results of a row."""
    tokens, row, result = key["sizes"]["tokens"], ROWS[key["row"]], {}
    before = evaluate_base(model, corpus, tokens, base)
    with tempfile.TemporaryDirectory() as folder:
        out, start = Path(folder) / "out", (processor_seconds(), time.perf_counter())
        if key["row"] != "before":
            files = ("--model_name", str(model), "--train_file", str(corpus.write(Path(folder) / "train.jsonl")))
            fine_tune(*files, *key["options"].split(), output_dir=out, threads=1)
            result = {
                "processor_minutes": (processor_seconds() - start[0]) / 60,
                "minutes": (time.perf_counter() - start[1]) / 60,
            }
        found = evaluate(out, corpus, tokens) if result else before
        report = json.loads((out / "privacy.json").read_text()) if "--target_epsilon" in key["options"] and result else None
    if report:
        names = ("epsilon", "delta", "noise_multiplier", "sample_rate", "steps", "noise_bands", "tpr_at_fpr")
        result["privacy"] = {name: report.get(name) for name in names}
        if row.unit == "text":
            result["promise"] = promise_to_authors(report, corpus.texts_per_author())
    versions = {name: version(name) for name in ("torch", "transformers", "peft")}
    return {**summarize(found, before), **result, "date": str(date.today()), "versions": versions}


SIZES = {"--authors": 64, "--steps": 16, "--tokens": 16, "--evaluated": 500, "--texts": 1, "--corpus_authors": 0}


def run_options(what: str, choices: Iterable[str], sizes: dict[str, int], repetitions: int) -> list:
    """Return the options of a table that measures on one corpus: `what` of `choices`, and the sizes."""
    return [
        option("corpus", choices=list(RATES)),
        option(f"{what}s", nargs="+", choices=list(choices), metavar=what.upper()),
        option("--model_name", type=Path, default=ROOT / "demo" / "model"),
        option("--data", type=Path, default=ROOT / "demo" / "comments.jsonl", help="JSON lines of author and content, maybe .gz"),
        *(option(name, type=int, default=default) for name, default in sizes.items()),
        option("--at_once", type=int, default=16, help="authors in memory at once"),
        option("--repetitions", type=int, default=repetitions, help=f"runs of each {what} that there should be in all"),
    ]


def given_sizes(args: argparse.Namespace, sizes: Iterable[str]) -> dict[str, int]:
    """Return the values of the options `sizes`, for the key of a cached row."""
    return {name.removeprefix("--"): getattr(args, name.removeprefix("--")) for name in sizes}


@table(
    *run_options("row", ROWS, SIZES, repetitions=1),
    option("--work", type=Path, help="folder that keeps the losses of the model before training; default: a temporary one"),
    option("--cache", type=Path, default=CACHE),
    passes_on=True,
)
def run(args: argparse.Namespace) -> None:
    """Measure rows, as often as asked for, where they are not in the cache.

    Sizes: authors per step, steps, tokens per text; authors evaluated on each side, and texts of each; authors of the corpus, 0
    for all. Other options are passed on to fine-tune-dp.py.
    """
    sizes = given_sizes(args, SIZES)
    model = args.model_name.resolve()
    model_name = "demo/model" if model == ROOT / "demo" / "model" else model.name
    corpus = make_corpus(read_rows(args.data), args.evaluated, args.texts, args.corpus_authors)
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base.json"
        if args.work:
            args.work.mkdir(parents=True, exist_ok=True)
            of_base = (args.tokens, args.evaluated, args.texts, args.corpus_authors)
            base = args.work / "-".join(map(str, ("base", args.corpus, model.name, *of_base)))
        for row in args.rows:
            options = "" if row == "before" else options_of(ROWS[row], args.corpus, args)
            key = {"corpus": args.corpus, "model": model_name, "row": row, "sizes": sizes, "options": options}
            measure = partial(train_and_evaluate, corpus=corpus, model=model, base=base)
            for result in cached(args.cache, [key] * args.repetitions, measure):
                print(row, json.dumps(result), flush=True)


# --- the table ------------------------------------------------------------------------------------------------

HEADS = (
    "row", "token loss", "perplexity", "author loss", "share of the gain", "found by the attack, 1 % FPR", "at most",
    "exposure (bits)", "processor minutes",
)  # fmt: skip


def mean_and_spread(values: list[float], digits: int = 3) -> str:
    more = f" ± {statistics.stdev(values):.{digits}f} ({len(values)} runs)" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{more}"


def format_attack(results: list[dict[str, Any]]) -> str:
    """Return the share of members that are found, its mean over runs, with the interval of a single run."""
    found, members = statistics.mean(one["attack"]["found"] for one in results), results[0]["attack"]["members"]
    low, high = clopper_pearson(round(found), members)
    return f"{found / members:.1%} ({low:.1%} to {high:.1%})"


def format_count(texts: int) -> str:
    return f"{texts:,} text{'s' * (texts != 1)}"


def format_bound(result: dict[str, Any]) -> str:
    """Return the largest true-positive rate of any attacker; of a guarantee for each text, on the author in the middle."""
    if "privacy" not in result:
        return "none"
    rates, promise = result["privacy"]["tpr_at_fpr"], result.get("promise")
    if promise is None:
        return f"{rates['0.01']:.1%}"
    if promise["median"]["texts"] > 1:  # of more texts than the guarantee's unit, only an epsilon is known
        rates = bounds_of_guarantee(promise["median"]["epsilon"], DELTA)["tpr_at_fpr"]
    return f"{rates['0.01']:.1%} (an author of {format_count(promise['median']['texts'])})"


def format_promise(promise: dict[str, dict[str, float]], delta: float) -> str:
    """Return what an author is promised; an epsilon of log(1 / delta) or more excludes no attack that errs with delta."""
    limit, parts = math.log(1 / delta), []
    for name, one in promise.items():
        by_groups = "nothing" if one["group_epsilon"] is None else f"{one['group_epsilon']:.1f}"
        vacuous = ", vacuous" if one["epsilon"] >= limit else ""
        author = f"the {name} author ({format_count(one['texts'])})"
        parts.append(f"{author} epsilon {one['epsilon']:,.1f}{vacuous}; by group privacy {by_groups}")
    return "per text promises " + ", and ".join(parts)


def format_results(name: str, results: list[dict[str, Any]], known: dict[str, list[dict[str, Any]]]) -> str:
    """Return a line of the table.

    Args:
        known: results of each row of the same corpus, model and sizes.
    """
    losses, row = [one["loss"] for one in results], ROWS[name]
    share, minutes, found, bound = "", "", "", ""
    if name != "before":
        minutes = f"{statistics.mean(one['processor_minutes'] for one in results):.1f}"
        found, bound = format_attack(results), format_bound(results[0])
        if "before" in known and BASELINES[row.kind] in known:
            start, end = (statistics.mean(one["loss"] for one in known[base]) for base in ("before", BASELINES[row.kind]))
            share = f"{(start - statistics.mean(losses)) / (start - end):.0%}"
    author_loss = mean_and_spread([one["author_loss"] for one in results])
    exposures = statistics.mean(value for one in results for value in one["exposures"])
    cells = (row.title, mean_and_spread(losses), f"{math.exp(statistics.mean(losses)):.1f}")
    author_cell = f"{author_loss}, standard error {results[0]['author_loss_stderr']:.3f}"
    return format_row(*cells, author_cell, share, found, bound, f"{exposures:.1f}", minutes)


def format_group(group: dict[str, Any], known: dict[str, list[dict[str, Any]]], options: dict[str, str]) -> list[str]:
    """Return the lines of one corpus, model and sizes: a title, the table, and what the guarantee for each text promises."""
    every = [one for results in known.values() for one in results]
    sizes = ", ".join(f"{name} {value}" for name, value in group["sizes"].items())
    versions = ", ".join(f"{name} {number}" for name, number in every[-1]["versions"].items())
    dates = sorted({one["date"] for one in every})
    members, others = every[0]["attack"]["members"], every[0]["attack"]["others"]
    title = f"**{group['corpus']}, {group['model']}** ({sizes}; {' to '.join(dict.fromkeys((dates[0], dates[-1])))}; {versions})"
    low, high = rate_at_threshold(others)
    against = f"{members} trained authors against {others} held-out ones, at a true FPR of {low:.1%} to {high:.1%} (95 %)"
    lines = [f"{title}: {against}.", "", format_head(*HEADS)]
    for name, row in ROWS.items():
        if known.get(name):
            lines.append(format_results(name, known[name], known))
        elif group["model"] in EVERY_ROW:
            lines.append(format_row(row.title, "not yet run", *[""] * (len(HEADS) - 2)))
    promises = [one for one in known.get("text-8", []) if "promise" in one]
    lines += ["", *(f"Epsilon 8 {format_promise(one['promise'], one['privacy']['delta'])}." for one in promises[:1])]
    return [*lines, *[""] * bool(promises)]


def read_cache(path: Path) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Return the results of each row by corpus, model and sizes as JSON; of a row with several options, those of the last."""
    groups: dict[str, dict[str, dict[str, list]]] = defaultdict(lambda: defaultdict(dict))
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        key, result = json.loads(line)
        group = json.dumps({name: key[name] for name in ("corpus", "model", "sizes")})
        rows = groups[group][key["row"]]
        rows.setdefault(key["options"], []).append(result)
    return {group: {name: list(found.values())[-1] for name, found in rows.items()} for group, rows in groups.items()}


def write_between_markers(page: str, content: str) -> str:
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    assert after, f"{PAGE} lacks the markers"
    return f"{before}{BEGIN}\n{content}\n{END}{after}"


@table(option("--cache", type=Path, default=CACHE), option("--page", type=Path, default=PAGE))
def results(args: argparse.Namespace) -> None:
    """Write the table of what was measured, and of what is missing, between the markers of docs/results.md."""
    lines = [line for group, known in read_cache(args.cache).items() for line in format_group(json.loads(group), known, {})]
    content = "\n".join(lines).strip()
    args.page.write_text(write_between_markers(args.page.read_text(encoding="utf-8"), content + "\n"), encoding="utf-8")
    print(content)


@table()
def rows(args: argparse.Namespace) -> None:
    """The rows that can be asked for, and their options of fine-tune-dp.py at the default sizes."""
    sizes = argparse.Namespace(**{name.removeprefix("--"): value for name, value in SIZES.items()}, at_once=16, rest=[])
    print_head("row", "what", "options, on the commits")
    for name, row in ROWS.items():
        print_row(name, row.title, "" if name == "before" else f"`{options_of(row, 'commits', sizes)}`")


if __name__ == "__main__":
    main(__doc__, run, results, rows)
