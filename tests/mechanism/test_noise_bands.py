"""noise.py and banded_mf.py: each condition of its theorem, in the parts and in whole runs, and what is accounted for."""

import functools
import math

import bugs
import numpy as np
import pytest
import torch
from conftest import flat, within
from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent, SelfComposedDpEvent
from dp_accounting.pld import PLDAccountant
from mutation import catches
from scipy.linalg import toeplitz
from scipy.optimize import check_grad
from test_mechanism import make_optimizer

from author_dp.accounting.accountant import compute_epsilon, find_noise_multiplier
from author_dp.accounting.banded_mf import (
    banded_error_ratio,
    banded_step_noise_std,
    choose_bands,
    log_banded_error,
    prefix_sum_rmse,
    toeplitz_coefficients,
)
from author_dp.accounting.events import MechanismEvent, cyclic_event, cyclic_sample_rate
from author_dp.data.splits import author_hashes
from author_dp.errors import UserError
from author_dp.guards.noise_inversion import NoiseDecorrelator
from author_dp.mechanism.noise import BandMFNoise, GaussianNoise
from author_dp.mechanism.sampling import CyclicAuthorSampler, PoissonAuthorSampler, assign_sampling_groups
from data_utils import group_by_author

KEY = bytes(32)
CPU = torch.device("cpu")


def matrix(coefficients: np.ndarray, steps: int) -> np.ndarray:
    """C, dense, (steps, steps)."""
    column = np.zeros(steps)
    column[: len(coefficients)] = coefficients[:steps]
    return toeplitz(column, np.zeros(steps))


# --- the matrix -------------------------------------------------------------------------------------------


@catches("columns not of norm 1", "accounting.banded_mf.toeplitz_coefficients", "np.linalg.norm(coefficients) * (1 + 1e-12)",
    "coefficients[0]")  # fmt: skip
def test_toeplitz_coefficients_have_norm_one_and_one_entry_per_band():
    for bands, steps in ((1, 10), (2, 10), (4, 50), (8, 154), (8, 8)):
        c = toeplitz_coefficients.__wrapped__(bands, steps)
        norms = np.linalg.norm(matrix(c, steps), axis=0)
        assert len(c) == bands and norms.max() <= 1 and norms[0] == pytest.approx(1, abs=1e-9)
        assert np.allclose(matrix(c, steps), np.tril(matrix(c, steps)))
    assert toeplitz_coefficients(1, 10).tolist() == pytest.approx([1.0])


def test_prefix_sum_rmse_and_step_noise_std_match_dense_matrices():
    c, steps = toeplitz_coefficients(4, 30), 30
    sums = np.tril(np.ones((steps, steps))) @ np.linalg.inv(matrix(c, steps))
    assert prefix_sum_rmse(c, steps) == pytest.approx(np.linalg.norm(sums) / math.sqrt(steps))
    assert prefix_sum_rmse(np.ones(1), steps) == pytest.approx(math.sqrt((steps + 1) / 2))
    inverse = np.linalg.inv(matrix(c, steps))
    assert banded_step_noise_std(c, steps) == pytest.approx(np.linalg.norm(inverse[-1]))


def test_toeplitz_coefficients_beat_the_square_roots():
    start = np.array([0.5, 0.375, 0.3125])
    assert check_grad(lambda c: log_banded_error(c, 40)[0], lambda c: log_banded_error(c, 40)[1], start) < 1e-5
    assert math.exp(log_banded_error(start, 40)[0] / 2) == pytest.approx(prefix_sum_rmse(square_roots(4), 40) * math.sqrt(40))
    for bands in (2, 4, 8):
        best = prefix_sum_rmse(toeplitz_coefficients(bands, 154), 154)
        assert best < 0.97 * prefix_sum_rmse(square_roots(bands), 154)
        for direction in np.random.default_rng(0).standard_normal((20, bands)):
            moved = toeplitz_coefficients(bands, 154) + 0.02 * direction
            assert prefix_sum_rmse(moved / np.linalg.norm(moved), 154) >= best * (1 - 1e-6)


def square_roots(bands: int) -> np.ndarray:
    c = np.cumprod([1.0, *((2 * i - 1) / (2 * i) for i in range(1, bands))])
    return c / np.linalg.norm(c)


# --- the noise --------------------------------------------------------------------------------------------


def noises(bands: int, steps: int, size: int = 40_000, std: float = 0.5) -> np.ndarray:
    """What `BandMFNoise` adds in each step, (steps, size)."""
    noise, source = BandMFNoise(toeplitz_coefficients(bands, steps), size, CPU), GaussianNoise(CPU)
    source.chunk_size = 15_000  # parts, the last one smaller
    return np.stack([noise.add_(torch.zeros(size), source, std).numpy() for _ in range(steps)])


@catches("a band dropped", *bugs.A_BAND_DROPPED, bands=3)
@catches("band coefficients in reverse", "mechanism.noise.BandMFNoise.add_", "zip(rows, lag_coefficients)",
    "zip(rows, lag_coefficients[::-1])", bands=3)  # fmt: skip
@pytest.mark.parametrize("bands", [2, 3, 5])
def test_the_covariance_of_released_noise_is_that_of_the_inverse(bands):
    steps, size = 11, 40_000
    released = noises(bands, steps, size)
    inverse = np.linalg.inv(matrix(toeplitz_coefficients(bands, steps), steps))
    expected = 0.25 * inverse @ inverse.T
    found = released @ released.T / size
    scale = np.sqrt(np.outer(np.diag(expected), np.diag(expected)) / size)
    assert np.all(np.abs(found - expected) < 6 * np.sqrt(2) * scale)
    whitened = matrix(toeplitz_coefficients(bands, steps), steps) @ released  # C w = z: independent, N(0, std^2)
    assert np.all(np.abs(whitened @ whitened.T / size / 0.25 - np.eye(steps)) < 6 * math.sqrt(2 / size))
    neighbours = (released[:, 1:] * released[:, :-1]).mean(1) / released.var(1)
    assert np.abs(neighbours).max() < 6 / math.sqrt(size)


def test_undoing_the_bands_gives_independent_noise_and_leaves_one_band_alone():
    c = toeplitz_coefficients(4, 20)
    undo, released = NoiseDecorrelator(c), torch.from_numpy(noises(4, 20, 1_000))
    rows = np.stack([undo(row).numpy() for row in released])
    assert np.allclose(rows, matrix(c, 20) @ released.numpy(), atol=1e-5)
    same = NoiseDecorrelator(toeplitz_coefficients(1, 20))(released[0])
    assert torch.equal(same, released[0].to(same.dtype))


def test_one_band_is_the_mechanism_as_it_was_draw_for_draw(monkeypatch):
    def add(generator, total, std):
        return total.add_(torch.randn(total.shape, generator=generator), alpha=std)

    updates = []
    for begin in (False, True):
        optimizer, parameters = make_optimizer(size=1_000)
        generator = torch.Generator().manual_seed(1)
        monkeypatch.setattr(GaussianNoise, "add_", functools.partial(add, generator))
        if begin:
            optimizer.start_training(toeplitz_coefficients(1, 10))
        for _ in range(3):
            optimizer.zero_grad()
            optimizer.step()
        updates.append(flat(parameters))
    assert torch.equal(*updates)
    plain, grouped = (make_sampler([1] * 300, 0.1, bands=1, groups=groups) for groups in (None, np.zeros(300, np.int64)))
    for _ in range(20):
        assert np.array_equal(plain.sample_authors(), grouped.sample_authors())


# --- groups and draws -------------------------------------------------------------------------------------


def make_sampler(counts, sample_rate, bands, groups=None, key=7, **options) -> PoissonAuthorSampler:
    offsets = np.concatenate([[0], np.cumsum(counts)])
    options = {"sample_rate": sample_rate, "samples_per_author": 1, "steps": 1, "key": key, **options}
    if bands == 1 and groups is None:
        return PoissonAuthorSampler(offsets, np.arange(offsets[-1]), **options)
    return CyclicAuthorSampler(offsets, np.arange(offsets[-1]), bands=bands, groups=groups, **options)


def participation(authors: int, sample_rate: float, bands: int, steps: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Who was drawn when, bool (steps, authors), and the groups."""
    groups = assign_sampling_groups(np.random.default_rng(seed).integers(2**63, size=authors).astype(np.uint64), bands, KEY)
    sampler, found = make_sampler([1] * authors, sample_rate, bands, groups, key=seed), np.zeros((steps, authors), bool)
    for row in found:
        samples = sampler.sample_batch().samples
        row[[int(s[0]) for s in samples]] = True
    return found, groups


@catches("groups that move when an author leaves", "mechanism.sampling.assign_sampling_groups", "for value in hashes",
    "for value in range(len(hashes))")  # fmt: skip
def test_a_group_follows_from_the_author_and_the_key_alone():
    names = [f"author {i}" for i in range(5_000)]
    hashes, rest = author_hashes(names), author_hashes([name for i, name in enumerate(names) if i % 3])
    assert len(set(hashes.tolist())) == 5_000
    groups = assign_sampling_groups(hashes, 8, KEY)
    assert np.array_equal(
        assign_sampling_groups(rest, 8, KEY), groups[np.arange(5_000) % 3 != 0]
    )  # nobody moves when others leave
    other = assign_sampling_groups(hashes, 8, b"1" * 32)
    assert within((other == groups).mean(), 1 / 8, math.sqrt(7 / 64 / 5_000))
    sizes = np.bincount(groups, minlength=8)
    assert len(sizes) == 8 and all(within(size, 625, math.sqrt(625)) for size in sizes)
    repeated = [name for name in names[:50] for _ in range(2)]
    assert np.array_equal(author_hashes(repeated), hashes[:50]) and len(group_by_author(repeated)[0]) == 51


def test_authors_are_drawn_at_b_q_when_it_is_their_turn_and_independently():
    drawn, groups = participation(2_000, 0.02, bands=5, steps=1_000)
    for step, row in enumerate(drawn[:50]):
        assert not row[groups != step % 5].any()
    own = np.stack([drawn[group::5, groups == group].mean() for group in range(5)])
    assert np.all(np.abs(own - 0.1) < 6 * math.sqrt(0.09 / 200 / 350))
    rates = drawn.mean(0) * 5  # of each author, over its own draws
    assert within(rates.var(), 0.09 / 200, 0.09 / 200 * math.sqrt(2 / 2_000) * 1.5)
    first = drawn[0::5][:, groups == 0].astype(float)
    assert within(np.corrcoef(first[1:].ravel(), first[:-1].ravel())[0, 1], 0, 1 / math.sqrt(first[1:].size))
    sizes = first.sum(1)
    assert within(sizes.var(), first.shape[1] * 0.09, first.shape[1] * 0.09 * math.sqrt(2 / len(sizes)))


@catches("a group drawn twice in b steps", "mechanism.sampling.CyclicAuthorSampler.sample_authors",
    "self.batches % len(self.members)", "self.batches // 2 % len(self.members)", bands=4)  # fmt: skip
@pytest.mark.parametrize("bands", [2, 4, 7])
def test_sensitivity_of_what_the_sampler_can_draw(bands):
    steps = 23
    c = matrix(toeplitz_coefficients(bands, steps), steps)
    drawn, _ = participation(300, 0.8 / bands, bands, steps)
    norms = np.linalg.norm(c @ drawn, axis=0)  # gradients of norm 1, all in one direction: the worst case
    assert norms.max() <= math.sqrt(math.ceil(steps / bands)) * (1 + 1e-9)
    always, _ = participation(300, 1 / bands, bands, steps)
    reached = np.linalg.norm(c @ always, axis=0).max()
    cut = (1 - np.linalg.norm(c, axis=0) ** 2).max()  # the last columns are cut off
    assert math.sqrt(math.ceil(steps / bands) - cut) <= reached * (1 + 1e-9)
    last = np.full(300, -bands)
    for step, row in enumerate(drawn):
        assert (step - last[row] >= bands).all()
        last[row] = step


def test_draws_are_numbered_over_epochs_and_processes():
    sampler = make_sampler([1] * 50, 0.1, 3, assign_sampling_groups(np.arange(50, dtype=np.uint64), 3, KEY), steps=4)
    assert [batch.batch_index for _ in range(3) for batch in sampler] == list(range(12))
    shares = [
        make_sampler(
            [1] * 50, 0.3, 3, assign_sampling_groups(np.arange(50, dtype=np.uint64), 3, KEY), key=5, rank=r, world_size=2
        )
        for r in range(2)
    ]
    whole = make_sampler([1] * 50, 0.3, 3, assign_sampling_groups(np.arange(50, dtype=np.uint64), 3, KEY), key=5)
    for _ in range(9):
        parts = [int(s[0]) for share in shares for s in share.sample_batch().samples]
        assert sorted(parts) == [int(s[0]) for s in whole.sample_batch().samples]


def test_nobody_is_drawn_without_a_group():
    for groups in (None, np.zeros(49, np.int64)):
        with pytest.raises(ValueError, match="every author needs a group"):
            make_sampler([1] * 50, 0.1, 3, groups)


def test_longer_columns_are_refused():
    optimizer, _ = make_optimizer(size=100)
    for coefficients in (np.ones(2), np.array([np.nan, 0.5]), toeplitz_coefficients(4, 10) * 1.001):
        with pytest.raises(ValueError, match="norm 1"):
            optimizer.start_training(coefficients)


def test_the_optimizer_takes_each_draw_once_and_in_order():
    optimizer, _ = make_optimizer(size=1_000)
    optimizer.start_training(toeplitz_coefficients(3, 10))
    for number in (0, 1):
        optimizer.zero_grad()
        optimizer.batch_index = number
        optimizer.step()
    for wrong in (None, 0, 1, 3, 4):
        optimizer.zero_grad()
        optimizer.batch_index = wrong
        with pytest.raises(RuntimeError, match="discarded batch"):
            optimizer.step()
    optimizer.batch_index = 2
    optimizer.step()


# --- accounting -------------------------------------------------------------------------------------------


@catches("a cycle that is not whole accounted as none", "accounting.events.cyclic_event", "-(-steps // bands)",
    "steps // bands")  # fmt: skip
def test_cyclic_event_has_fewer_steps_at_a_higher_rate():
    assert cyclic_event(0.9, 0.01, 100, 8) == MechanismEvent(0.9, 0.08, 13)
    assert cyclic_event(0.9, 0.01, 96, 8).steps == 12 and cyclic_event(0.9, 0.01, 97, 8).steps == 13
    assert cyclic_event(0.9, 0.01, 0, 8).steps == 0 and cyclic_event(0.9, 0.01, 5, 1) == MechanismEvent(0.9, 0.01, 5)
    assert cyclic_sample_rate(1 / 49, 49) == 1.0 and cyclic_sample_rate(1 / 3, 3) == 1.0
    with pytest.raises(UserError, match=r"--noise_bands 8: .* Lower the bands to at most 7$"):
        cyclic_sample_rate(0.13, 8)


@pytest.mark.integration
@catches("q instead of b q accounted", "accounting.events.cyclic_event", "cyclic_sample_rate(sample_rate, bands)",
    "sample_rate")  # fmt: skip
def test_cyclic_event_epsilon_agrees_with_dp_accounting():
    for sigma, rate, steps, bands in ((0.65, 0.013, 154, 8), (1.1, 0.05, 50, 4)):
        accounted = cyclic_event(sigma, rate, steps, bands)
        judge = PLDAccountant()
        judge.compose(SelfComposedDpEvent(PoissonSampledDpEvent(bands * rate, GaussianDpEvent(sigma)), math.ceil(steps / bands)))
        ours = compute_epsilon(accounted.noise_multiplier, accounted.sample_rate, accounted.steps, 1e-5)
        assert ours == pytest.approx(judge.get_epsilon(1e-5), rel=0.01)


@pytest.mark.integration
def test_choose_bands_has_nearly_the_least_error_allowed():
    few = choose_bands(0.013, 154, 8.0, 5e-5, 64)
    assert few in (8, 16)
    assert choose_bands(0.013, 154, 8.0, 5e-5, 3) == 2 and choose_bands(0.013, 154, 8.0, 5e-5, 1) == 1
    assert choose_bands(0.3, 154, 8.0, 5e-5, 64) <= 3 and choose_bands(1.0, 60, 8.0, 1e-3, 64) == 1
    accounted = cyclic_event(0, 0.013, 154, few)
    sigma = find_noise_multiplier(accounted.sample_rate, accounted.steps, 8.0, 5e-5)
    assert 0.5 < banded_error_ratio(sigma, 0.013, 154, few, 8.0, 5e-5) < 0.6
