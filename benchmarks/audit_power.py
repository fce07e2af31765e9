"""What the audit can show: its lower bound on epsilon where everything is learned by heart, with less and less noise.

python benchmarks/audit_power.py [--canaries 200] [--authors 200] [--steps 150]

A small GPT-2 on random text, every author in every batch: the best case for the audit. Prints one table.
"""

import argparse
import secrets
import statistics
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from datasets import Dataset, Features, List, Value
from transformers import GPT2Config, GPT2LMHeadModel, PrinterCallback, TrainingArguments
from transformers.utils import logging

from author_dp.guards.text_canaries import TextCanaries
from data_utils import AuthorDataset, collate
from dp_utils import DPTrainer, PrivacyArguments

VOCABULARY, TOKENS, DELTA, RUNS = 61, 10, 1e-5, 3


def audit_once(args: argparse.Namespace, noise: dict) -> tuple[dict, float | None]:
    """Train once; return the audit and the epsilon that was accounted for."""
    texts = np.random.default_rng(0).integers(VOCABULARY, size=(args.authors, TOKENS))
    train = Dataset.from_dict({"input_ids": texts}, features=Features({"input_ids": List(Value("int32"))}))
    audit = TextCanaries(args.canaries, 1, TOKENS, VOCABULARY, secrets.randbits(128))
    joined = audit.join(train, np.arange(args.authors + 1), np.arange(args.authors))
    config = GPT2Config(vocab_size=VOCABULARY, n_positions=16, n_embd=64, n_layer=2, n_head=2, bos_token_id=0, eos_token_id=0,
                        resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        trainer = DPTrainer(
            GPT2LMHeadModel(config),
            TrainingArguments(
                output_dir=folder, max_grad_norm=0, max_steps=args.steps, learning_rate=1e-2, lr_scheduler_type="constant",
                per_device_train_batch_size=args.authors + args.canaries, report_to=[], disable_tqdm=True, save_strategy="no",
                logging_strategy="no", use_cpu=True,
            ),
            PrivacyArguments(per_sample_max_grad_norm=0.5, target_delta=DELTA, **noise),
            train_dataset=AuthorDataset(*joined),
            data_collator=collate,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        audit.start(trainer)
        trainer.train()
        return audit.finish(trainer), trainer.privacy_report()["epsilon"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--canaries", type=int, default=200)
    parser.add_argument("--authors", type=int, default=200)
    parser.add_argument("--steps", type=int, default=150)
    args = parser.parse_args()
    logging.set_verbosity_error()
    print(f"{args.authors} authors, {args.canaries} canaries, {args.steps} steps of all of them, medians of {RUNS} runs\n")
    print("| noise | epsilon (upper bound) | audit: epsilon at least | right of guesses |\n|---|---|---|---|")
    noises = [{"target_epsilon": epsilon} for epsilon in (2.0, 8.0, 100.0)] + [{"noise_multiplier": s} for s in (0.3, 0.0)]
    for noise in noises:
        runs = sorted((audit_once(args, noise) for _ in range(RUNS)), key=lambda run: run[0]["epsilon_lower_bound"])
        found, epsilon = runs[RUNS // 2]
        bound = statistics.median(run["epsilon_lower_bound"] for run, _ in runs)
        name, value = next(iter(noise.items()))
        spent = "none" if epsilon is None else f"{epsilon:,.4g}"
        print(f"| `--{name} {value:g}` | {spent} | {bound:.2f} | {found['correct']} of {found['guesses']} |", flush=True)


if __name__ == "__main__":
    main()
