"""What do the checks find: planted bugs in a run, what is learned by heart, and rounding?

python benchmarks/checks.py found_by_the_run [PART OF A NAME ...]
python benchmarks/checks.py audit_power [--canaries 200] [--authors 200] [--steps 150]
python benchmarks/checks.py rounding
"""

import argparse
import json
import re
import runpy
import secrets
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import torch
from common import ROOT, alone_command, main, make_trainer, option, print_head, print_row, table, where
from datasets import Dataset, Features, List, Value
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, PrinterCallback
from transformers.utils import logging

import dp_utils
from author_dp.clipping import ENGINES
from author_dp.guards.text_canaries import TextCanaries
from author_dp.mechanism.losses import author_losses
from author_dp.mechanism.microbatches import make_microbatch_shape, make_microbatches
from data_utils import AuthorDataset, collate

# --- planted bugs ---------------------------------------------------------------------------------------------

OPTIONS = (
    f"--model_name {ROOT}/demo/model --train_file {ROOT}/demo/comments.jsonl --sequence_len 64 --target_epsilon 8 "
    "--per_sample_max_grad_norm 1.0 --samples_per_author 2 --audit_canaries 1000 --audit_kind gradient --logging_steps 5 "
    "--save_strategy no --eval_fraction 0 --log_level warning --disable_tqdm True"
)
USUAL = "--per_device_train_batch_size 64 --gradient_accumulation_steps 4 --max_steps 100"
SMALL = "--per_device_train_batch_size 1 --gradient_accumulation_steps 1 --max_steps 150"  # batches are often empty
ADD_NOISE = "author_dp.mechanism.optimizer.AuthorDPOptimizer.add_noise_and_divide"
ON_TWO = {  # processes
    "all of the noise on every process": (ADD_NOISE, "std /= math.sqrt(self.grad_buffer.noise_shares)", "pass", ""),
    "noise on the first process alone": (ADD_NOISE, "if std > 0:", "if torch.distributed.get_rank() == 0:", ""),
    "another sampler key on each process": (
        "author_dp.training.dataloading.make_sampler", "broadcast(secrets.randbits(128))", "secrets.randbits(128)", ""),
    "the whole draw on each process": (
        "author_dp.mechanism.sampling.PoissonAuthorSampler.sample_batch", "authors[self.rank :: self.world_size]", "authors", ""),
}  # fmt: skip
FURTHER = ("noise reused in each step", "noise from --seed in each step", "Laplacian noise")
SHORT = {
    "released noise fails a test:": "noise:",
    "gradient canaries fail a test:": "canaries:",
    "sampling of authors fails a test:": "sampling:",
}
LEFT_OUT = {"an author who is never in"}  # who does not show in 100 steps at the demo's rate; in the test at a higher one


def bugs() -> dict[str, tuple]:
    import test_gradient_canaries
    import test_noise_monitor

    further = {name: test_noise_monitor.BUGS[name] for name in FURTHER}
    return {"none": (), **test_gradient_canaries.BUGS, **further, **ON_TWO}


def plant_and_run(name: str, arguments: list[str]) -> None:
    """Run the script in this process, with a bug from the moment at which training starts."""
    from planting import find, with_edit

    train = dp_utils.DPTrainer.train

    def train_with_bug(*args, **kwargs):
        if bug := bugs()[name]:
            where, old, new = bug[:3]
            function = find(where)
            function.__code__ = with_edit(function, old, new)  # type: ignore[attr-defined]
        return train(*args, **kwargs)

    dp_utils.DPTrainer.train = train_with_bug  # type: ignore[method-assign]
    sys.argv = ["fine-tune-dp.py", *arguments]
    runpy.run_path(str(ROOT / "fine-tune-dp.py"), run_name="__main__")


def found_in(name: str) -> tuple[str, str | int]:
    """Return what a run with this bug finds, and after how many steps it stops."""
    processes = 2 if name in ON_TWO else 1
    options = SMALL if name == "empty draws skipped" else USUAL
    with tempfile.TemporaryDirectory() as folder:
        arguments = [*f"{OPTIONS} {options} --output_dir {folder}/out".split(), *(["--use_cpu"] if processes > 1 else [])]
        command = alone_command(plant_and_run, processes, name=name, arguments=arguments)
        done = subprocess.run(command, capture_output=True, text=True)
        said = re.search(r"is not what the ledger says: (.*?)(?: \(after|: anyone|\. Nothing)", done.stderr)
        if said is None:
            assert done.returncode == 0, done.stderr
            audit = json.loads((Path(folder) / "out" / "privacy.json").read_text(encoding="utf-8"))["audit"]
            low, high = audit["epsilon_between"]
            return f"not stopped; epsilon between {low:.2f} and {high:.2f}, at least {audit['epsilon_lower_bound']:.2f}", ""
        ledger = (Path(folder) / "out" / "privacy_ledger.jsonl").read_text(encoding="utf-8")
        found = said[1]
        for words, short in SHORT.items():
            found = found.replace(words, short)
        return found, sum('"record": "step"' in line for line in ledger.splitlines())


@table(option("names", nargs="*", help="parts of the names of bugs; all by default"))
def found_by_the_run(args: argparse.Namespace) -> None:
    """Which mistakes in the mechanism does a run find by itself, and how soon?

    Plants the bugs of tests/guards/test_gradient_canaries.py, and some of tests/guards/test_noise_monitor.py,
    in a run of the demo at epsilon 8 with gradient canaries, one at a time, after the model check (which finds wrong clips before
    anything is trained). The run tests itself every five steps.
    """
    print_head("planted", "found", "after steps")
    for name in bugs():
        if name not in LEFT_OUT and (not args.names or any(words in name for words in args.names)):
            print_row(name, *found_in(name))


# --- what the audit can show ----------------------------------------------------------------------------------

DELTA, AUDIT_RUNS, AUDIT_TOKENS = 1e-5, 3, 10
VOCABULARY = 61
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}


def audit_once(args: argparse.Namespace, noise: dict) -> tuple[dict, float | None]:
    """Train once; return the audit and the epsilon that was accounted for."""
    texts = np.random.default_rng(0).integers(VOCABULARY, size=(args.authors, AUDIT_TOKENS))
    train = Dataset.from_dict({"input_ids": texts}, features=Features({"input_ids": List(Value("int32"))}))
    audit = TextCanaries(args.canaries, 1, AUDIT_TOKENS, VOCABULARY, secrets.randbits(128))
    joined = audit.join(train, np.arange(args.authors + 1), np.arange(args.authors))
    size = {"vocab_size": VOCABULARY, "n_positions": 16, "n_embd": 64, "n_layer": 2, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**size, bos_token_id=0, eos_token_id=0, **NO_DROPOUT))
    with tempfile.TemporaryDirectory() as folder:
        trainer = make_trainer(
            "ghost", model, AuthorDataset(*joined), folder, steps=args.steps - 1, learning_rate=1e-2,
            lr_scheduler_type="constant", per_device_train_batch_size=args.authors + args.canaries, use_cpu=True,
            privacy={"per_sample_max_grad_norm": 0.5, "target_delta": DELTA, **noise},
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        audit.start(trainer)
        trainer.train()
        return audit.finish(trainer), trainer.privacy_report()["epsilon"]


@table(
    option("--canaries", type=int, default=200),
    option("--authors", type=int, default=200),
    option("--steps", type=int, default=150),
)
def audit_power(args: argparse.Namespace) -> None:
    """What the audit can show: its lower bound on epsilon where everything is learned by heart, with less and less noise.

    A small GPT-2 on random text, every author in every batch: the best case for the audit.
    """
    logging.set_verbosity_error()
    print(f"{args.authors} authors, {args.canaries} canaries, {args.steps} steps of all of them, medians of {AUDIT_RUNS} runs\n")
    print_head("noise", "epsilon (upper bound)", "audit: epsilon at least", "right of guesses")
    noises = [{"target_epsilon": epsilon} for epsilon in (2.0, 8.0, 100.0)] + [{"noise_multiplier": s} for s in (0.3, 0.0)]
    for noise in noises:
        runs = sorted((audit_once(args, noise) for _ in range(AUDIT_RUNS)), key=lambda run: run[0]["epsilon_lower_bound"])
        found, epsilon = runs[AUDIT_RUNS // 2]
        bound = statistics.median(run["epsilon_lower_bound"] for run, _ in runs)
        name, value = next(iter(noise.items()))
        spent = "none" if epsilon is None else f"{epsilon:,.4g}"
        print_row(f"`--{name} {value:g}`", spent, f"{bound:.2f}", f"{found['correct']} of {found['guesses']}")


# --- rounding -------------------------------------------------------------------------------------------------

TOKENS, LENGTH = 64, 21
KINDS = ("identical", "random", "one token", "two tokens in turn")
CANCELING = [np.array([3, 5, 7]), np.array([3, 5, 9])]  # texts of one author

Author = list[np.ndarray]  # token ids of each text


def make_authors(kind: str, count: int, vocabulary: int) -> list[Author]:
    """Return `count` authors of one text each."""
    rng = np.random.default_rng(0)
    if kind == "random":
        return [[rng.integers(1, vocabulary, rng.integers(2, LENGTH))] for _ in range(count)]
    if kind == "identical":
        return [[rng.integers(1, vocabulary, LENGTH)]] * count
    return [[np.resize([5] if kind == "one token" else [5, 9], LENGTH)]] * count


def canceling_model() -> tuple[GPT2LMHeadModel, float]:
    """Return a model that was trained on CANCELING until an author's gradient is small, and the norm of that gradient."""
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_positions=TOKENS, n_embd=16, n_layer=2, n_head=2, **NO_DROPOUT))
    ids = torch.tensor(np.stack(CANCELING))
    batch = {"input_ids": ids, "labels": ids, "author": torch.zeros(2, dtype=torch.long), "num_authors": 1}
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    norm = float("inf")
    for step in range(4_000):
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 if step < 300 else 1e-3 if step < 1_500 else 1e-4
        optimizer.zero_grad()
        author_losses(model, batch).sum().backward()
        norm = float(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm())
        if norm < 1e-3:
            break
        optimizer.step()
    return model.eval(), norm


def clipped_sum(model, clip_norm: float, authors: list[Author], first: int, bf16: bool, constant: bool) -> torch.Tensor:
    """Return the clipped sum over the authors of a batch from `first` on, over C, float64."""
    shape = make_microbatch_shape(256, 1, max(map(len, authors)), TOKENS) if constant else None
    engine, total = ENGINES["ghost"](model, clip_norm), 0.0
    rows = [[{"input_ids": ids.astype(np.int32), "number": number} for ids in texts] for number, texts in enumerate(authors)]
    numbers: list[list[int]] = []

    def collate_and_note(samples: list) -> dict:
        numbers.append([sample.get("number", 0) for sample in samples])
        return collate(samples)

    for batch, of_batch in zip(make_microbatches(rows, 256, collate_and_note, shape), numbers):
        for parameter in engine.parameters:
            parameter.summed_grad = torch.zeros_like(parameter, requires_grad=False)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            losses = author_losses(engine.module, batch)
        # The gradient of a loss that is not kept is left out: times zero it is not clipped, and adds nothing.
        of_author = torch.zeros(len(losses), dtype=torch.long).index_reduce(0, batch["author"], torch.tensor(of_batch), "amax")
        engine.backward(losses * (of_author >= first), batch["author"])
        total = total + torch.cat([p.summed_grad.flatten() for p in engine.parameters]).double()
    engine.close()
    return total / clip_norm


def movement(model, clip_norm: float, authors: list[Author], bf16: bool, constant: bool) -> float:
    """Return how far the clipped sum of these authors moves, at most, when one more joins them."""
    alone = clipped_sum(model, clip_norm, authors, 0, bf16, constant)
    joining = [np.arange(10, 10 + length) for length in (2, 5, 8, LENGTH, 40)]
    every = (clipped_sum(model, clip_norm, [[ids], *authors], 1, bf16, constant) for ids in joining)
    return max(float((beside - alone).norm()) for beside in every)


@table()
def rounding(args: argparse.Namespace) -> None:
    """How far one author moves the clipped gradients of all others, by nothing but rounding.

    The kernel of a matrix product follows from its shape, and so does the way in which a norm is computed. Where a microbatch's
    shape follows from the sampled authors, one author more changes the gradients of all others. In exact arithmetic they do not
    move.

    The table has the largest movement found when a further author joins in front of the others, with texts of several lengths.
    Texts are, for the demo's model and a C below all norms: identical ones, whose rounding errors add up, random ones, and texts
    of one and of two tokens. Then, for a tiny GPT-2 that was trained on them and C just below the norm, authors of two texts
    whose gradients cancel.
    """
    demo = AutoModelForCausalLM.from_pretrained(ROOT / "demo" / "model").eval()
    tiny, norm = canceling_model()
    print(f"31 or 128 authors, in C; {where()}\n")
    print_head("precision", "microbatches", "most for other texts", "texts that cancel")
    for bf16 in (True, False):
        for constant in (False, True):
            cases = ((kind, count) for kind in KINDS for count in (31, 128))
            found = {
                f"{kind}, {count}": movement(demo, 0.05, make_authors(kind, count, demo.config.vocab_size), bf16, constant)
                for kind, count in cases
            }
            worst = max(found, key=found.__getitem__)
            canceling = movement(tiny, 0.999 * norm, [CANCELING] * 128, bf16, constant)
            names = "bfloat16" if bf16 else "float32", "constant shapes" if constant else "as large as the batch"
            print_row(*names, f"{found[worst]:.2g} ({worst})", f"{canceling:.2g}")


if __name__ == "__main__":
    main(__doc__, found_by_the_run, audit_power, rounding)
