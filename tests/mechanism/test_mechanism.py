"""Test sampling, losses and the noisy step against their definitions, and each silent way to break them.

Random checks allow six standard deviations: chance alone fails none in a lifetime of runs, and all fail when the property is
broken.
"""

import math

import bugs
import numpy as np
import pytest
import torch
from conftest import COUNTS, as_arrays, flat, make_batch, tiny_gpt2, within
from mutation import catches
from scipy import stats
from torch import nn

from author_dp.mechanism.losses import author_losses
from author_dp.mechanism.microbatches import make_microbatches
from author_dp.mechanism.optimizer import AuthorDPOptimizer
from author_dp.mechanism.sampling import PoissonAuthorSampler
from data_utils import collate, group_by_author

# --- sampling -----------------------------------------------------------------------------------


def make_sampler(authors=1_000, sample_rate=0.05, samples_per_author=1, counts=None, **options) -> PoissonAuthorSampler:
    offsets, indices = group_by_author(np.repeat(np.arange(authors), counts if counts is not None else 1))
    options = {"steps": 10, "key": 1234, **options}
    return PoissonAuthorSampler(offsets, indices, sample_rate=sample_rate, samples_per_author=samples_per_author, **options)


def sample_steps(sampler, steps) -> np.ndarray:
    """Return (steps, authors), 1 where an author is in the batch."""
    present = np.zeros((steps, len(sampler.offsets) - 1))
    for row in present:
        row[sampler.sample_authors()] = 1
    return present


@catches("an author who is always in", *bugs.AN_AUTHOR_ALWAYS_IN)
@catches("a gap one too long", "mechanism.sampling.PoissonAuthorSampler.sample_indices", "chunks.append(last + np.cumsum",
    "chunks.append(last + 1 + np.cumsum")  # fmt: skip
def test_sampler_takes_every_author_with_probability_q():
    steps, q = 4_000, 0.05
    rates = sample_steps(make_sampler(sample_rate=q), steps).mean(0)
    deviation = math.sqrt(q * (1 - q) / steps)
    assert all(within(rate, q, deviation) for rate in rates)
    assert within(rates.mean(), q, deviation / math.sqrt(len(rates)))


@catches("shuffled, of a fixed size", "mechanism.sampling.PoissonAuthorSampler.sample_indices", "sampled[sampled < size]",
    "np.sort(self._authors_generator.permutation(size)[: round(self.sample_rate * size)])")  # fmt: skip
def test_sampler_has_binomial_batch_sizes():
    sizes = sample_steps(make_sampler(authors=300, sample_rate=0.02), 5_000).sum(1)
    observed = np.bincount(sizes.astype(int), minlength=20)[:20]
    expected = stats.binom.pmf(np.arange(20), 300, 0.02) * len(sizes)
    common = expected > 10
    chi_square = ((observed - expected)[common] ** 2 / expected[common]).sum()
    assert chi_square < stats.chi2.isf(1e-9, common.sum())
    assert observed[0] > 0  # empty draws are among them


@catches("authors drawn two by two", "mechanism.sampling.PoissonAuthorSampler.sample_indices", "sampled[sampled < size]",
    "np.union1d(sampled[sampled < size] // 2 * 2, sampled[sampled < size] // 2 * 2 + 1)")  # fmt: skip
def test_sampler_takes_authors_and_steps_independently():
    present = sample_steps(make_sampler(authors=40, sample_rate=0.3), 5_000)
    between_authors = np.corrcoef(present.T) - np.eye(40)
    between_steps = np.array([np.corrcoef(a[1:], a[:-1])[0, 1] for a in present.T])
    assert np.abs(between_authors).max() < 6 / math.sqrt(5_000)
    assert np.abs(between_steps).max() < 6 / math.sqrt(5_000)


@catches("draws cut off where more gaps are needed", "mechanism.sampling.PoissonAuthorSampler.sample_indices",
    "while last < size:", "while not chunks:")  # fmt: skip
def test_sampler_reaches_the_last_author():
    """Further gaps are sampled if the first ones did not reach the end: here each gap reaches one author further."""
    sampler = make_sampler(authors=200, sample_rate=1e-3)

    class Short:
        def geometric(self, p, size):
            return np.ones(min(size, 7), np.int64)

    sampler._authors_generator = Short()
    assert sampler.sample_authors().tolist() == list(range(200))


def test_sampler_costs_what_it_samples():
    sampler = make_sampler(authors=1, sample_rate=1e-5)
    sampler.offsets = np.broadcast_to(np.int64(0), 10**9 + 1)  # 8 GB, if it were read
    sizes = [len(sampler.sample_authors()) for _ in range(200)]
    assert within(np.mean(sizes), 1e4, math.sqrt(1e4 / 200))
    authors = np.concatenate([sampler.sample_authors() for _ in range(20)])
    assert authors.min() >= 0 and authors.max() < 10**9 and stats.kstest(authors / 1e9, "uniform").pvalue > 1e-9


@catches("an empty draw skipped", "mechanism.sampling.PoissonAuthorSampler.__iter__", "yield self.sample_batch()",
    "yield next(batch for batch in iter(self.sample_batch, None) if batch.batch_size)")  # fmt: skip
def test_sampler_takes_all_at_rate_one_and_keeps_empty_batches():
    assert len(make_sampler(sample_rate=1.0).sample_batch().samples) == 1_000
    batches = list(make_sampler(authors=3, sample_rate=0.01, steps=500))
    assert len(batches) == 500 and sum(batch.batch_size == 0 for batch in batches) > 400
    assert all(batch.samples == [] for batch in batches if batch.batch_size == 0)


@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_sampler_splits_a_batch_evenly_over_processes(world_size):
    alone = make_sampler(key=99)
    shares = [make_sampler(key=99, rank=rank, world_size=world_size) for rank in range(world_size)]
    for _ in range(50):
        expected = alone.sample_authors().tolist()
        parts = [share.sample_batch() for share in shares]
        authors = [int(samples[0]) for part in parts for samples in part.samples]
        assert sorted(authors) == expected
        assert {part.batch_size for part in parts} == {len(expected)}
        assert max(len(part.samples) for part in parts) - min(len(part.samples) for part in parts) <= 1


@catches("k + 1 samples", "mechanism.sampling.choose_samples", "< max_samples", "<= max_samples", k=3)
@pytest.mark.parametrize("k", [1, 3])
def test_sampler_chooses_up_to_k_samples_uniformly(k):
    counts = np.array([1, 2, 5, 40])
    sampler = make_sampler(authors=4, sample_rate=1.0, samples_per_author=k, counts=counts)
    drawn = np.zeros(counts.sum())
    steps = 4_000
    for _ in range(steps):
        samples = sampler.sample_batch().samples
        assert [len(part) for part in samples] == np.minimum(counts, k).tolist()
        for author, part in enumerate(samples):
            assert len(set(part.tolist())) == len(part)
            low, high = sampler.offsets[author : author + 2]
            assert set(part.tolist()) <= set(sampler.indices[low:high].tolist())
            drawn[part] += 1
    expected = np.repeat(np.minimum(counts, k) / counts, counts)
    deviation = np.sqrt(expected * (1 - expected) / steps)
    assert all(within(*figures) for figures in zip(drawn / steps, expected, deviation))


def test_make_microbatches_keeps_everything_once_and_pads_little():
    generator = np.random.default_rng(0)
    authors = [
        [{"input_ids": np.full(generator.integers(2, 100), a)} for _ in range(generator.integers(1, 4))] for a in range(50)
    ]
    microbatches = make_microbatches(authors, max_authors=8, collate=collate)
    assert len(microbatches) == 7 and max(batch["num_authors"] for batch in microbatches) <= 8
    seen = {}
    for batch in microbatches:
        assert sorted(set(batch["author"].tolist())) == list(range(batch["num_authors"]))
        for ids, labels, owner in zip(batch["input_ids"], batch["labels"], batch["author"]):
            row = ids[labels != -100]
            seen.setdefault((id(batch), owner.item()), []).append((row[0].item(), len(row)))
    assert sorted(sorted(rows) for rows in seen.values()) == sorted(
        sorted((a, len(row["input_ids"])) for row in rows) for a, rows in enumerate(authors)
    )
    widths = [batch["input_ids"].shape[1] for batch in microbatches]
    assert widths == sorted(widths) and widths[0] < 60
    assert make_microbatches([], max_authors=8, collate=collate) == []


# --- losses -----------------------------------------------------------------------------------


@catches("a mean over the tokens of the batch", "mechanism.losses.author_losses", "counts.clamp(min=1)",
    "counts.sum().clamp(min=1)")  # fmt: skip
def test_author_losses_are_means_over_the_authors_tokens():
    model, batch = tiny_gpt2().eval(), make_batch()
    losses = author_losses(model, batch)
    assert losses.shape == (len(COUNTS),) and losses.dtype == torch.float32
    for loss, samples in zip(losses, as_arrays(batch)):
        total, tokens = 0.0, 0
        for sample in samples:
            ids = torch.from_numpy(sample)
            logits = model(ids[None]).logits[0, :-1]
            total += nn.functional.cross_entropy(logits, ids[1:], reduction="sum").item()
            tokens += len(ids) - 1
        assert loss.item() == pytest.approx(total / tokens, rel=1e-5)


def test_author_losses_are_zero_without_targets():
    batch = collate([{"input_ids": [3]}, {"input_ids": [1, 2, 3]}])
    batch |= {"author": torch.tensor([0, 1]), "num_authors": 2}
    losses = author_losses(tiny_gpt2(), batch)
    assert losses[0] == 0 and losses[1] > 0


# --- noise and update ---------------------------------------------------------------------------


def make_optimizer(size=200_000, *, sigma=1.5, clip_norm=0.2, batch_size=10, before_release=lambda: None):
    parameters = [nn.Parameter(torch.zeros(size)), nn.Parameter(torch.zeros(size // 100, 100))]
    optimizer = AuthorDPOptimizer(
        torch.optim.SGD(parameters, lr=1.0),
        noise_multiplier=sigma, clip_norm=clip_norm, expected_batch_size=batch_size, before_release=before_release,
    )  # fmt: skip
    return optimizer, parameters


@catches("no noise", *bugs.NO_NOISE)
@catches("noise that does not scale with the clip norm", *bugs.NOISE_WITHOUT_CLIP_NORM)
def test_optimizer_adds_gaussian_noise_of_the_stated_scale():
    optimizer, parameters = make_optimizer()
    optimizer.step()  # an empty batch: noise only
    noise = -flat(parameters) * 10 / (1.5 * 0.2)
    assert within(noise.mean().item(), 0, 1 / math.sqrt(len(noise)))
    assert within(noise.var().item(), 1, math.sqrt(2 / len(noise)))
    assert stats.kstest(noise.numpy(), "norm").pvalue > 1e-9
    assert stats.kstest(-parameters[1].detach().flatten().numpy() * 10 / 0.3, "norm").pvalue > 1e-9


def test_optimizer_adds_independent_noise_to_all_entries_and_steps():
    optimizer, parameters = make_optimizer()
    steps = []
    for _ in range(2):
        before = flat(parameters).clone()
        optimizer.zero_grad()
        optimizer.step()
        steps.append((flat(parameters) - before).numpy())
    size = len(steps[0]) // 2
    pairs = [(steps[0], steps[1]), (steps[0][:size], steps[0][size:]), (steps[0][1:], steps[0][:-1])]
    pairs += [(np.abs(a), np.abs(b)) for a, b in pairs]
    for a, b in pairs:
        assert within(np.corrcoef(a, b)[0, 1], 0, 1 / math.sqrt(len(a)))
    assert len(np.unique(steps[0])) > 0.9 * len(steps[0])


@catches("a gradient used twice", "mechanism.optimizer.AuthorDPOptimizer.zero_grad", "self.grad_buffer.zero_()", "pass")
def test_optimizer_divides_by_the_constant_and_uses_a_sum_once():
    optimizer, parameters = make_optimizer(size=100, sigma=0.0)
    parameters[0].summed_grad.fill_(5.0)
    optimizer.step()
    assert torch.allclose(parameters[0], torch.full((100,), -0.5)) and parameters[1].abs().sum() == 0
    with pytest.raises(RuntimeError, match="zero_grad"):
        optimizer.step()
    optimizer.zero_grad()
    optimizer.step()
    assert torch.allclose(parameters[0], torch.full((100,), -0.5))


@catches("noise for the first part of the parameters only", "mechanism.optimizer.AuthorDPOptimizer.add_noise_and_divide",
    "self.grad_buffer.sums.split(self.noise.chunk_size)", "self.grad_buffer.sums.split(self.noise.chunk_size)[:1]")  # fmt: skip
def test_optimizer_keeps_parameters_in_place_for_any_chunk_size():
    optimizer, parameters = make_optimizer(size=100, sigma=0.0)
    optimizer.noise.chunk_size = 7
    for parameter in parameters:
        parameter.summed_grad.copy_(torch.arange(parameter.numel(), dtype=torch.float32).view_as(parameter))
    optimizer.step()
    assert all(torch.allclose(-p.flatten() * 10, torch.arange(p.numel(), dtype=torch.float32)) for p in parameters)


def test_optimizer_updates_nothing_when_the_step_cannot_be_recorded():
    def fail():
        raise OSError("disk full")

    optimizer, parameters = make_optimizer(size=100, before_release=fail)
    with pytest.raises(OSError):
        optimizer.step()
    assert all(parameter.abs().sum() == 0 for parameter in parameters)
