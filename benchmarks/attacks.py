"""What an author gives away to those who have the model: losses, membership, planted codes; and what a guarantee promises."""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accounting_and_data import author_epsilon
from corpora import DIGITS, Corpus, planted_secrets
from memorization import exposure, score_all_codes
from scipy.stats import beta
from transformers import AutoModelForCausalLM, AutoTokenizer

from author_dp.accounting.accountant import compute_epsilon
from author_dp.mechanism.losses import token_losses
from author_dp.training.evaluation import summarize_losses
from data_utils import collate

FALSE_POSITIVES = 0.01
AT_ONCE = 16  # texts in an evaluation batch
CELLS = 20_000  # of the grid of an author's privacy loss


@torch.no_grad()
def losses_of_authors(model: Any, tokenizer: Any, texts: dict[str, list[str]], tokens: int) -> np.ndarray:
    """Return the sum of losses and the number of target tokens of each author, float64 (authors, 2)."""
    owners = [index for index, written in enumerate(texts.values()) for _ in written]
    ids = tokenizer([text for written in texts.values() for text in written], truncation=True, max_length=tokens).input_ids
    sums = np.zeros((len(texts), 2))
    by_length = sorted(range(len(ids)), key=lambda index: len(ids[index]))
    for start in range(0, len(ids), AT_ONCE):
        batch = by_length[start : start + AT_ONCE]
        losses, has_target = token_losses(model, collate([{"input_ids": ids[index]} for index in batch]))
        np.add.at(sums, [owners[index] for index in batch], torch.stack([losses.sum(1), has_target.sum(1)], 1).double().numpy())
    return sums


def clopper_pearson(hits: int, trials: int, confidence: float = 0.95) -> tuple[float, float]:
    """Return the exact two-sided interval of a binomial rate (Clopper and Pearson 1934)."""
    tail = (1 - confidence) / 2
    low = beta.ppf(tail, hits, trials - hits + 1) if hits else 0.0
    return float(low), float(beta.ppf(1 - tail, hits + 1, trials - hits) if hits < trials else 1.0)


def rate_at_threshold(others: int) -> tuple[float, float]:
    """Return the 95 % interval of the true false-positive rate of `attack`: its threshold is an order statistic of others."""
    allowed = math.floor(FALSE_POSITIVES * others)
    low, high = beta.ppf((0.025, 0.975), allowed + 1, others - allowed)
    return float(low), float(high)


def attack(members: np.ndarray, others: np.ndarray) -> dict[str, float]:
    """Return how many members a threshold on the score finds that at most 1 % of the others are below.

    Args:
        members, others: scores (authors,), smaller for likelier members: loss less that of the model before training.
    """
    allowed = math.floor(FALSE_POSITIVES * len(others))
    threshold = np.sort(others)[allowed]
    return {"found": int((members < threshold).sum()), "members": len(members), "others": len(others)}


def group_epsilon(sigma: float, rate: float, steps: int, samples: int, delta: float) -> float | None:
    """Return what group privacy gives an author of that many texts, at the same delta: None if it is above 1,000.

    For each delta0, epsilon0 of a text: samples x epsilon0, where delta0 (e^(samples epsilon0) - 1) / (e^epsilon0 - 1) is at
    most delta (Vadhan 2017, The Complexity of Differential Privacy, Lemma 2.2).
    """

    def log_expm1(x: float) -> float:
        return x + math.log1p(-math.exp(-x))

    for delta0 in (delta / 10**power for power in range(35)):
        epsilon = compute_epsilon(sigma, rate, steps, delta0)
        if epsilon == 0:
            if samples * delta0 <= delta:
                return 0.0
            continue
        if samples * epsilon > 1_000:
            break
        if math.log(delta0 / delta) + log_expm1(samples * epsilon) <= log_expm1(epsilon):
            return samples * epsilon
    return None


def promise_to_authors(report: dict[str, Any], counts: dict[str, int]) -> dict[str, dict[str, float | None]]:
    """Return what a guarantee for each text promises an author, at its delta, for each number of texts."""
    steps = (report["noise_multiplier"], report["sample_rate"], report["steps"])
    return {
        name: {
            "texts": texts,
            "epsilon": author_epsilon(*steps, texts, report["delta"], CELLS),
            "group_epsilon": group_epsilon(*steps, texts, report["delta"]),
        }
        for name, texts in counts.items()
    }


class Evaluation(NamedTuple):
    """Of one model: arrays as of `losses_of_authors`."""

    members: np.ndarray
    held_out: np.ndarray
    exposures: list[float]


def evaluate(folder: Path, corpus: Corpus, tokens: int) -> Evaluation:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    sides = (losses_of_authors(model, tokenizer, texts, tokens) for texts in (corpus.members, corpus.held_out))
    with torch.inference_mode():
        codes = [exposure(score_all_codes(model, tokenizer, one.beginning, DIGITS), one.code) for one in planted_secrets()]
    return Evaluation(*sides, codes)


def evaluate_base(folder: Path, corpus: Corpus, tokens: int, file: Path) -> Evaluation:
    """Return the evaluation of the model before training, from `file` where it was kept there."""
    if not file.exists():
        found = evaluate(folder, corpus, tokens)
        file.write_text(json.dumps([found.members.tolist(), found.held_out.tolist(), found.exposures]))
    members, held_out, exposures = json.loads(file.read_text())
    return Evaluation(np.array(members), np.array(held_out), exposures)


def summarize(found: Evaluation, base: Evaluation) -> dict[str, Any]:
    scores = [side[:, 0] / side[:, 1] - before[:, 0] / before[:, 1] for side, before in zip(found[:2], base[:2])]
    return {**summarize_losses(*torch.from_numpy(found.held_out).T), "attack": attack(*scores), "exposures": found.exposures}
