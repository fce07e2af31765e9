"""What a model repeats of a secret that somebody wrote again and again: without privacy, with it for each text, for each author.

    python benchmarks/memorization.py [--seeds 2] [--steps 500] [--parallel 1] [--cache FILE]

Made-up authors, among those of the demo's corpus, write a code of four digits into 1, 10, 30 or 100 texts ("amber otter's code is
4 9 2 7. ..."). The script trains the demo's model on all of it, in equally many steps of as many texts, in three ways:

    none    ordinary fine-tuning, --disable_dp, each text a unit of its own: --author_column text
    sample  epsilon 8 for each text: the same unit, so the guarantee is for one text, not for its author
    author  epsilon 8 for each author, with all texts: --author_column author

Then it asks the model for each code: is it what greedy decoding writes after "amber otter's code is", and how far ahead of the
10,000 codes that it could be is it? The latter is the exposure of Carlini et al. 2019 (The Secret Sharer, arXiv 1802.08232,
Definition 5 and equation 1): log2 of their number less log2 of the rank of the true one, exact here, as all of them are ranked.
13.3 bits are a code known for sure; chance gives 1.4 on average, as the codes of authors show who were left out of the training.

Prints tables for docs/results.md, draws memorization.png beside this file. A training that is in the cache is not repeated.
"""

import argparse
import json
import math
import random
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any, NamedTuple

import torch
from common import ROOT, cache_option, cached, drawing, fine_tune, main, option, parallel_option, print_head, print_row, table
from make_corpus import PRIVATE_TOPICS, make_author, make_comment, make_corpus, parse_topic
from transformers import AutoModelForCausalLM, AutoTokenizer

DIGITS = 4
CODES = 10**DIGITS
REPETITIONS = (0, 1, 10, 30, 100)  # 0: left out of the training, for comparison
SECRETS = 8  # of each
AUTHORS = 3_000  # of the corpus around them
COLORS = (
    "amber azure beige black blue brown coral cyan green grey indigo ivory khaki lilac olive pink red rose teal white".split()
)
ANIMALS = "otter heron falcon badger lynx raven gecko hare moth newt".split()
OPTIONS = (
    "--sequence_len 64 --per_device_train_batch_size 64 --gradient_accumulation_steps 4 --learning_rate 5e-3 "
    "--lr_scheduler_type constant --target_delta 1e-5 --per_sample_max_grad_norm 1.0 --save_strategy no --log_level warning "
    "--disable_tqdm True --logging_steps 100"
)
WAYS = {
    "none": "--author_column text --disable_dp",
    "sample": "--author_column text --target_epsilon 8",
    "author": "--author_column author --target_epsilon 8",
}
NAMES = {"none": "no privacy", "sample": "epsilon 8 for each text", "author": "epsilon 8 for each author"}


class Secret(NamedTuple):
    beginning: str  # "amber otter's code is"
    code: str  # "4927"
    repetitions: int  # texts of its author that say it

    @property
    def sentence(self) -> str:
        return self.beginning + "".join(f" {digit}" for digit in self.code)


def make_secrets(seed: int) -> list[Secret]:
    generator = random.Random(f"secrets {seed}")
    names = generator.sample([f"{color} {animal}" for color in COLORS for animal in ANIMALS], SECRETS * len(REPETITIONS))
    codes = [f"{code:0{DIGITS}}" for code in generator.sample(range(CODES), len(names))]
    repetitions = [repetitions for repetitions in REPETITIONS for _ in range(SECRETS)]
    return [Secret(f"{name}'s code is", code, times) for name, code, times in zip(names, codes, repetitions)]


def write_corpus(path: Path, secrets: list[Secret], seed: int) -> None:
    """Write the demo's corpus and the texts of the secrets' authors, shuffled."""
    generator = random.Random(f"texts {seed}")
    topics = [{"name": name, **parse_topic(text)} for name, text in PRIVATE_TOPICS.items()]
    rows = [(row["author"], row["content"]) for row in make_corpus("private", AUTHORS, 7)]
    for number, secret in enumerate(secrets):
        author = make_author(generator, topics)
        texts = [f"{secret.sentence}. {make_comment(generator, author)}" for _ in range(secret.repetitions)]
        rows += [(f"secret{number}", text) for text in texts]
    generator.shuffle(rows)
    write(path, rows, "text")


def write_validation(path: Path) -> None:
    rows = make_corpus("private", 500, 8)
    write(path, [(f"new {row['author']}", row["content"]) for row in rows], "new")


def write(path: Path, rows: list[tuple[str, str]], name: str) -> None:
    """Write authors and texts as JSON lines with a further column, text, in which each text has a name of its own."""
    lines = (json.dumps({"author": author, "text": f"{name}{i}", "content": text}) for i, (author, text) in enumerate(rows))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


# --- what the model knows ---------------------------------------------------------------------------------


def tokens_of_digits(tokenizer: Any) -> list[list[int]]:
    """Return the tokens of " 0" to " 9", which must be as many of each."""
    digits = [tokenizer(f" {digit}", add_special_tokens=False).input_ids for digit in range(10)]
    assert len(set(map(len, digits))) == 1, "the tokenizer does not write digits alike"
    return digits


@torch.inference_mode()
def score_all_codes(model: Any, tokenizer: Any, beginning: str, length: int = DIGITS) -> torch.Tensor:
    """Return the log-probability of each code of `length` digits after `beginning`, float64 (codes,), from shorter to longer."""
    start, digits = tokenizer(beginning).input_ids, torch.tensor(tokens_of_digits(tokenizer))  # (10, tokens of a digit)
    width = digits.shape[1]
    scores, codes = torch.zeros(1, dtype=torch.float64), torch.zeros(1, 0, dtype=torch.long)
    for _ in range(length):
        ids = torch.cat([torch.tensor(start).expand(len(codes), -1), digits[codes].flatten(1)], 1)
        # All digits share their first tokens (a space), if they have several: the last one tells them apart.
        assert (digits[:, :-1] == digits[0, :-1]).all()
        ids = torch.cat([ids, digits[0, :-1].expand(len(ids), -1)], 1)
        logits = torch.cat([model(part).logits[:, -width:] for part in ids.split(2048)])  # (codes so far, width, vocabulary)
        logs = logits.double().log_softmax(-1)
        shared = sum(logs[:, place, digits[0, place]] for place in range(width - 1))
        scores = (scores + shared)[:, None] + logs[:, -1, digits[:, -1]]  # (codes so far, 10)
        codes = torch.cat([codes.repeat_interleave(10, 0), torch.arange(10).repeat(len(codes))[:, None]], 1)
        scores = scores.flatten()
    return scores


def exposure(scores: torch.Tensor, code: str) -> float:
    """Return log2 |R| - log2 rank of the true code."""
    rank = int((scores >= scores[int(code)]).sum())
    return math.log2(len(scores)) - math.log2(rank)


@torch.inference_mode()
def completes(model: Any, tokenizer: Any, secret: Secret) -> bool:
    """Whether greedy decoding writes the code."""
    beginning = tokenizer(secret.beginning, return_tensors="pt")
    length = len(tokenizer(secret.sentence).input_ids) - beginning.input_ids.shape[1]
    written = model.generate(**beginning, do_sample=False, max_new_tokens=length)
    return tokenizer.decode(written[0]) == secret.sentence


# --- runs ---------------------------------------------------------------------------------------------


def measure(way: str, seed: int, steps: int) -> dict[str, Any]:
    """Train once and ask for every secret."""
    secrets, start = make_secrets(seed), time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        texts, held_out, out = (Path(folder) / name for name in ("texts.jsonl", "held_out.jsonl", "out"))
        write_corpus(texts, secrets, seed)
        write_validation(held_out)
        places = f"--model_name {ROOT / 'demo' / 'model'} --train_file {texts} --validation_file {held_out}"
        options = f"{places} --max_steps {steps} {OPTIONS} {WAYS[way]}"
        loss = fine_tune(*options.split(), output_dir=out, threads=1)["after"]["eval_loss"]
        model, tokenizer = AutoModelForCausalLM.from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out)
        return {
            "exposures": [exposure(score_all_codes(model, tokenizer, one.beginning), one.code) for one in secrets],
            "completed": [completes(model, tokenizer, one) for one in secrets],
            "repetitions": [one.repetitions for one in secrets],
            "loss": loss,
            "seconds": time.perf_counter() - start,
        }


def by_repetitions(results: list[dict[str, Any]], what: str) -> dict[int, list[float]]:
    found = defaultdict(list)
    for result in results:
        for repetitions, value in zip(result["repetitions"], result[what]):
            found[repetitions].append(float(value))
    return found


def print_tables(results: dict[str, list[dict[str, Any]]]) -> None:
    head = ["left out" if times == 0 else f"{times} text{'s' * (times > 1)}" for times in REPETITIONS]
    for what, title in (("exposures", "mean exposure (bits)"), ("completed", "codes completed by greedy decoding")):
        print()
        print_head(title, *head, "evaluation loss")
        for way, runs in results.items():
            found = by_repetitions(runs, what)
            cells = [
                f"{statistics.mean(found[times]):.1f}"
                if what == "exposures"
                else f"{sum(found[times]):.0f} of {len(found[times])}"
                for times in REPETITIONS
            ]
            print_row(NAMES[way], *cells, f"{statistics.mean(run['loss'] for run in runs):.2f}")
    seconds = statistics.mean(run["seconds"] for runs in results.values() for run in runs)
    print(f"\n{sum(map(len, results.values()))} trainings, {seconds:.0f} s each")


def draw(results: dict[str, list[dict[str, Any]]], axes: Any) -> None:
    places, told = range(1, len(REPETITIONS)), REPETITIONS[1:]
    looks = {"none": ("#c8553d", (2.1, 11.9)), "sample": ("#b98412", (1.95, 4.3)), "author": ("#1b6ca8", (2.35, 0.1))}
    for way, runs in results.items():
        found, (color, place_of_name) = by_repetitions(runs, "exposures"), looks[way]
        axes.plot(places, [statistics.mean(found[times]) for times in told], "o-", color=color)
        axes.text(*place_of_name, NAMES[way], color=color, fontweight="bold", fontsize=10)
        for place, times in zip(places, told):
            axes.plot([place] * len(found[times]), found[times], ".", color=color, alpha=0.3, markersize=5, zorder=1)
    lines = {math.log2(CODES): "known\nfor sure", 1 / math.log(2): "chance"}
    for height in lines:
        axes.axhline(height, color="#8a8f98", linewidth=1, linestyle=":", zorder=0)
    axes.set(xlabel="texts in which its author wrote the code", ylabel="exposure of the code (bits)", ylim=(-0.4, 14.2))
    axes.set_title("Does the model give away a code that one author wrote?", loc="left", fontweight="bold", fontsize=11)
    axes.set_xticks(places, [str(times) for times in told])
    right = axes.secondary_yaxis("right")
    right.set_yticks(list(lines), list(lines.values()), fontsize=9)
    right.tick_params(length=0)
    right.spines["right"].set_visible(False)


@table(
    option("--seeds", type=int, default=2, help="each with secrets, texts and trainings of its own"),
    option("--steps", type=int, default=500),
    parallel_option(),
    cache_option("memorization.jsonl"),
)
def memorization(args: argparse.Namespace) -> None:
    """What a model repeats of a secret that somebody wrote again and again."""
    keys = [(way, seed, args.steps) for seed in range(args.seeds) for way in WAYS]
    results: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for (way, *_), result in zip(keys, cached(args.cache, keys, lambda key: measure(*key), args.parallel)):
        results[way].append(result)
    print_tables(results)
    with drawing("memorization.png", figsize=(6.8, 3.9)) as (_, axes):
        draw(results, axes)


if __name__ == "__main__":
    main(__doc__, memorization)
