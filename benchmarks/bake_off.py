"""What pays at an equal epsilon of 2, and with as many authors seen (steps x batch)? LoRA, on the corpora of user_level.py.

python benchmarks/bake_off.py run CORPUS WAY ... --model_name FOLDER --data FILE [sizes] [--repetitions 3]
python benchmarks/bake_off.py results         # the table of what was measured, and which ways win

`run` adds to bake_off.jsonl beside this file. Each way differs from the default in options of fine-tune-dp.py, or in batch and
steps. A way wins where its losses are below the default's on each corpus that was measured, two or more: Welch's t-test, one
sided, 5 % divided by the number of ways that were compared (Bonferroni).
"""

import argparse
import json
import tempfile
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from attacks import losses_of_authors
from common import cached, fine_tune, main, option, print_head, print_row, table
from corpora import Corpus, make_corpus, read_rows
from scipy.stats import ttest_ind
from torch import from_numpy
from transformers import AutoModelForCausalLM, AutoTokenizer
from user_level import COMMON, RATES, given_sizes, mean_and_spread, private, processor_seconds, run_options

from author_dp.training.evaluation import summarize_losses

CACHE = Path(__file__).with_suffix(".jsonl")
SIGNIFICANCE = 0.05


class Way(NamedTuple):
    rank: int = 8
    rate_factor: float = 1.0
    batch_factor: int = 1  # a batch larger by it, and as many times fewer steps
    options: str = ""
    variant: str = ""  # of variants.py


WAYS = {
    "default": Way(),
    "rate x2": Way(rate_factor=2),
    "rate x4": Way(rate_factor=4),
    "rank 4": Way(rank=4),
    "rank 16": Way(rank=16),
    "rank 64": Way(rank=64),
    "rank 64, rate x2": Way(rank=64, rate_factor=2),
    "batch x4": Way(batch_factor=4),
    "k = 4": Way(options="--samples_per_author 4"),
    "k = 16": Way(options="--samples_per_author 16"),
    "FFA-LoRA: A frozen": Way(variant="freeze_a"),
    "FFA-LoRA, rate x4": Way(rate_factor=4, variant="freeze_a"),
    "LoRA+: B's rate x4": Way(variant="raise_rate_of_b"),
    "scale-then-privatize": Way(options="--clipping grad_sample --adam_noise_correction False", variant="scale_then_privatize"),
    "independent noise": Way(options="--noise_bands 1"),
    "independent noise, batch x4": Way(batch_factor=4, options="--noise_bands 1"),
}


def options_of(way: Way, rate: str, authors: int, steps: int, tokens: int, at_once: int) -> str:
    """Return the options of fine-tune-dp.py, without files. The adapters' scale, lora_alpha / lora_dim, is the same for all."""
    batch, at_once = authors * way.batch_factor, min(at_once, authors)
    sizes = f"--per_device_train_batch_size {at_once} --gradient_accumulation_steps {batch // at_once}"
    lora = f"--enable_lora --lora_dim {way.rank} --lora_alpha {2 * way.rank} --lora_target_modules all-linear"
    bands = "1" if "--noise_bands 1" in way.options else "auto"
    more = way.options.replace("--noise_bands 1", "")
    steps = max(1, steps // way.batch_factor)
    rate = rate if way.rate_factor == 1 else f"{float(rate) * way.rate_factor:g}"
    parts = (f"--sequence_len {tokens} {sizes} --max_steps {steps} --learning_rate {rate}", lora, private(2, bands), COMMON, more)
    return " ".join(" ".join(parts).split())


def train_and_evaluate(key: dict[str, Any], *, corpus: Corpus, model: Path) -> dict[str, Any]:
    start = processor_seconds()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        files = ("--model_name", str(model), "--train_file", str(corpus.write(Path(folder) / "train.jsonl")))
        fine_tune(*files, *key["options"].split(), output_dir=out, threads=1, variant=WAYS[key["way"]].variant)
        minutes = (processor_seconds() - start) / 60
        trained, tokenizer = AutoModelForCausalLM.from_pretrained(out).eval(), AutoTokenizer.from_pretrained(out)
        found = losses_of_authors(trained, tokenizer, corpus.held_out, key["sizes"]["tokens"])
    return {**summarize_losses(*from_numpy(found).T), "processor_minutes": minutes}


SIZES = {"--authors": 64, "--steps": 16, "--tokens": 16, "--evaluated": 500, "--corpus_authors": 0}


@table(*run_options("way", WAYS, SIZES, repetitions=3), option("--cache", type=Path, default=CACHE))
def run(args: argparse.Namespace) -> None:
    """Measure ways, as often as asked for, where they are not in the cache. Sizes are the default's, as in user_level.py."""
    sizes = given_sizes(args, SIZES)
    model = args.model_name.resolve()
    corpus = make_corpus(read_rows(args.data), args.evaluated, 1, args.corpus_authors)
    for name in args.ways:
        options = options_of(WAYS[name], RATES[args.corpus]["LoRA"], args.authors, args.steps, args.tokens, args.at_once)
        key = {"corpus": args.corpus, "model": model.name, "way": name, "sizes": sizes, "options": options}
        for result in cached(args.cache, [key] * args.repetitions, partial(train_and_evaluate, corpus=corpus, model=model)):
            print(name, json.dumps(result), flush=True)


def winners(losses: dict[str, dict[str, list[float]]]) -> list[str]:
    """Return the ways that win.

    Args:
        losses: of each corpus, of each way, a loss for each run.
    """
    compared = {way for by_way in losses.values() for way in by_way} - {"default"}

    def wins(way: str) -> bool:
        pairs = [(by_way.get(way, []), by_way.get("default", [])) for by_way in losses.values()]
        if len(pairs) < 2 or any(len(side) < 2 for pair in pairs for side in pair):
            return False
        return all(ttest_ind(*pair, equal_var=False, alternative="less").pvalue < SIGNIFICANCE / len(compared) for pair in pairs)

    return sorted(filter(wins, compared))


@table(option("--cache", type=Path, default=CACHE))
def results(args: argparse.Namespace) -> None:
    """Print what was measured, and which ways win; of a way with several options, those of the last run.

    Corpora of one table have the same model and sizes.
    """
    groups: dict[str, dict[str, dict[str, list[float]]]] = defaultdict(lambda: defaultdict(dict))
    options: dict[tuple[str, ...], str] = {}
    for line in args.cache.read_text(encoding="utf-8").splitlines() if args.cache.exists() else []:
        key, result = json.loads(line)
        place = json.dumps([key["model"], key["sizes"]]), key["corpus"], key["way"]
        if options.get(place) != key["options"]:
            groups[place[0]][place[1]][place[2]] = []
        options[place] = key["options"]
        groups[place[0]][place[1]][place[2]].append(result["loss"])
    for name, losses in groups.items():
        print(f"\n{name}\n")
        print_head("way", *losses)
        for way in WAYS:
            print_row(way, *(mean_and_spread(by_way[way]) if by_way.get(way) else "not yet run" for by_way in losses.values()))
        print(f"\nwins by more than chance: {', '.join(winners(losses)) or 'none'}")


if __name__ == "__main__":
    main(__doc__, run, results)
