"""How useful synthetic text is: small models that learn from it against the same ones that learn from real text.

Promise: two models differ in their training texts alone: same size, seed, number of texts and of steps. Computed without noise
on private text: nothing here may be published.

The language model is a small GPT-2 over byte pairs; the classifier is linear over hashed words and pairs of words [1].

References:
    [1] Joulin et al. 2016, Bag of Tricks for Efficient Text Classification, arXiv 1607.01759
"""

import math
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import ByteLevelBPETokenizer
from torch import nn
from torch.nn import functional
from transformers import GPT2Config, GPT2LMHeadModel

from author_dp.outputs.overlap import words_of
from author_dp.types import IGNORE_INDEX

VOCABULARY, TOKENS, BATCH = 2_000, 64, 64  # byte pairs; of a text at most; texts of a step
END = "<|end|>"
PASSES = 10  # over few texts, at most: more would be learned by heart
BUCKETS, WIDTH = 2**16, 32  # of the classifier
EVALUATED = 2_000  # held-out texts, at most


def make_tokenizer(texts: Sequence[str]) -> ByteLevelBPETokenizer:
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(texts, vocab_size=VOCABULARY, special_tokens=[END], show_progress=False)
    return tokenizer


def encode(texts: Sequence[str], tokenizer: ByteLevelBPETokenizer) -> list[list[int]]:
    """Return the tokens of each text, begun and ended by END unless it is cut."""
    return [[0, *row.ids, 0][:TOKENS] for row in tokenizer.encode_batch(list(texts))]  # END is token 0


def padded(rows: Sequence[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return input_ids and labels, (texts, tokens), padded on the right."""
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    labels = torch.tensor([row + [IGNORE_INDEX] * (longest - len(row)) for row in rows])
    return ids, labels


def language_model(rows: Sequence[list[int]], vocabulary: int, steps: int, seed: int = 0) -> nn.Module:
    """Return a small GPT-2, trained on tokens of texts from nothing."""
    torch.manual_seed(seed)
    sizes: dict[str, Any] = {
        "n_positions": TOKENS,
        "n_embd": 128,
        "n_layer": 2,
        "n_head": 4,
        "bos_token_id": 0,
        "eos_token_id": 0,
    }
    model = GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, **sizes))
    if not steps:
        return model
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    draws = np.random.default_rng(seed)
    model.train()
    for _ in range(steps):
        ids, labels = padded([rows[i] for i in draws.integers(len(rows), size=BATCH)])
        optimizer.zero_grad()
        next_losses(model, ids, labels)[0].mean().backward()
        optimizer.step()
        schedule.step()
    return model


def next_losses(model: nn.Module, ids: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return for each token that is predicted its loss, and whether the likeliest guess was right; both flat."""
    counts = labels[:, 1:] != IGNORE_INDEX
    logits, targets = model(input_ids=ids).logits[:, :-1][counts], labels[:, 1:][counts]
    return functional.cross_entropy(logits, targets, reduction="none"), logits.argmax(-1) == targets


def evaluate(model: nn.Module, rows: Sequence[list[int]]) -> dict[str, float]:
    """Return loss (nats a token), and the share of tokens that are guessed."""
    model.eval()
    with torch.inference_mode():
        found = [next_losses(model, *padded(rows[i : i + BATCH])) for i in range(0, len(rows), BATCH)]
    losses, right = (torch.cat(parts).double() for parts in zip(*found))
    return {"loss": losses.mean().item(), "accuracy": right.mean().item()}


def compare_language_models(
    synthetic: Sequence[str], real: Sequence[str], held_out: Sequence[str], steps: int
) -> dict[str, dict[str, float]]:
    """Return what language models know of held-out texts that learned nothing, synthetic text, as much real text.

    Args:
        real: training texts; of these and the synthetic ones so many are taken as there are of the fewer.
        steps: at most; fewer where texts are few.
    """
    tokenizer = make_tokenizer(real)
    number = min(len(synthetic), len(real))
    steps = min(steps, math.ceil(PASSES * number / BATCH))
    test = encode(subsample(held_out, EVALUATED), tokenizer)
    rows: dict[str, tuple[Sequence[str], int]] = {
        "untrained": ([], 0), "synthetic": (subsample(synthetic, number), steps), "real": (subsample(real, number), steps),
    }  # fmt: skip
    size = tokenizer.get_vocab_size()
    return {name: evaluate(language_model(encode(texts, tokenizer), size, n), test) for name, (texts, n) in rows.items()}


def subsample(texts: Sequence[Any], number: int) -> list[Any]:
    """Return at most `number` of the texts, chosen by chance, the same ones each time."""
    chosen = np.random.default_rng(0).permutation(len(texts))[:number]
    return [texts[i] for i in chosen]


# --- labels -----------------------------------------------------------------------------------------------


def features(text: str) -> list[int]:
    """Return the buckets of a text's words and pairs of words; one bucket for a text without words."""
    words = words_of(text)
    pairs = [f"{a} {b}" for a, b in zip(words, words[1:])]
    return [zlib.crc32(word.encode()) % BUCKETS for word in (*words, *pairs)] or [0]


class Classifier(nn.Module):
    """Mean of learned vectors of words and pairs of words, then a linear layer [1]."""

    def __init__(self, labels: int):
        super().__init__()
        self.vectors, self.head = nn.EmbeddingBag(BUCKETS, WIDTH, mode="mean", sparse=True), nn.Linear(WIDTH, labels)

    def forward(self, texts: Sequence[list[int]]) -> torch.Tensor:
        """Return logits, (texts, labels)."""
        offsets = np.cumsum([0, *map(len, texts)])[:-1]
        return self.head(self.vectors(torch.tensor([bucket for row in texts for bucket in row]), torch.from_numpy(offsets)))


def classifier(texts: Sequence[str], labels: Sequence[int], number: int, seed: int = 0) -> Classifier:
    """Return a classifier that learned `labels`, each below `number`."""
    torch.manual_seed(seed)
    model, rows, draws = Classifier(number), [features(text) for text in texts], np.random.default_rng(seed)
    optimizer = torch.optim.Adagrad(model.parameters(), lr=0.1)  # of sparse gradients
    for _ in range(PASSES):
        order = draws.permutation(len(rows))
        for i in range(0, len(rows), BATCH):
            chosen = order[i : i + BATCH]
            optimizer.zero_grad()
            functional.cross_entropy(model([rows[j] for j in chosen]), torch.tensor([labels[j] for j in chosen])).backward()
            optimizer.step()
    return model


def compare_classifiers(
    synthetic: Sequence[tuple[str, str]], real: Sequence[tuple[str, str]], held_out: Sequence[tuple[str, str]]
) -> dict[str, float]:
    """Return the share of held-out texts whose label is found: the commonest label always, by synthetic text, by as much real.

    Args:
        synthetic, real, held_out: pairs of text and label.
    """
    names = {label: i for i, label in enumerate(sorted({label for rows in (synthetic, real, held_out) for _, label in rows}))}
    number = min(len(synthetic), len(real))
    tested, truth = [features(text) for text, _ in held_out], torch.tensor([names[label] for _, label in held_out])
    commonest = np.bincount([names[label] for _, label in real]).argmax()
    found = {"commonest label": (truth == int(commonest)).double().mean().item()}
    for name, rows in (("synthetic", subsample(synthetic, number)), ("real", subsample(real, number))):
        model = classifier([text for text, _ in rows], [names[label] for _, label in rows], len(names))
        with torch.inference_mode():
            found[name] = (model(tested).argmax(-1) == truth).double().mean().item()
    return found
