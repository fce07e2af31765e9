"""Test that noise consists of independent normal draws from secret keys."""

import math

import bugs
import numpy as np
import pytest
import torch
from conftest import make_trainer, within
from mutation import catches
from scipy import stats

from author_dp.mechanism import noise
from author_dp.mechanism.noise import CHUNK_PAIRS, GaussianNoise

CPU = torch.device("cpu")


def draws(size: int, std: float = 1.0, source: GaussianNoise | None = None) -> torch.Tensor:
    source = source or GaussianNoise(CPU)
    total = torch.zeros(size)
    for part in total.split(source.chunk_size):
        source.add_(part, std)
    return total


@pytest.mark.integration
@catches("noise of half the variance", *bugs.HALF_OF_THE_VARIANCE)
def test_noise_is_normal_in_the_middle_and_in_the_tails():
    values = draws(8_000_000).numpy()
    assert stats.kstest(values[:1_000_000], "norm").pvalue > 1e-9
    for moment, expected in ((1, 0), (2, 1), (3, 0), (4, 3), (6, 15)):
        spread = math.sqrt(stats.norm.moment(2 * moment) / len(values))
        assert within((values.astype(np.float64) ** moment).mean(), expected, spread)
    for threshold in (2.0, 3.0, 4.0, 4.5):
        expected = 2 * stats.norm.sf(threshold) * len(values)
        assert within((np.abs(values) > threshold).sum(), expected, math.sqrt(expected))


@catches("the same noise for two parameters", "mechanism.noise.GaussianNoise._add_pairs",
    "second_half.addcmul_(radius[: len(second_half)], self._sine",
    "second_half.addcmul_(radius[: len(second_half)], self._cosine")  # fmt: skip
def test_noise_is_independent_between_elements():
    source = GaussianNoise(CPU)
    first, second = draws(4 * CHUNK_PAIRS, source=source).numpy(), draws(4 * CHUNK_PAIRS, source=source).numpy()
    half = 2 * CHUNK_PAIRS
    pairs = [(first, second), (first[:half], first[half:]), (first[:-1], first[1:])]
    pairs += [(first[:CHUNK_PAIRS], first[CHUNK_PAIRS:half])]  # the cosine and the sine of the same angles
    for a, b in [*pairs, *((a**2, b**2) for a, b in pairs)]:
        assert within(np.corrcoef(a, b)[0, 1], 0, 1 / math.sqrt(len(a)))
    assert len(np.unique(first)) > 0.9 * len(first)


@pytest.mark.parametrize("size", [1, 2, CHUNK_PAIRS - 1, CHUNK_PAIRS, CHUNK_PAIRS + 1, 2 * CHUNK_PAIRS])
def test_noise_is_added_to_every_element(size):
    total = torch.full((size,), 1_000.0)
    GaussianNoise(CPU).add_(total, 10.0)
    assert (total != 1_000.0).float().mean() > 0.99  # float32 is coarse there
    if size > 100:
        assert within(total.var().item(), 100, 100 * math.sqrt(2 / size))


def test_noise_reaches_beyond_what_32_bits_would_give():
    source = GaussianNoise(CPU)
    source._stream = type("Stream", (), {"update_into": lambda self, zeros, bits: None})()  # the bits stay as set here
    source._radius_bits.fill_(1)
    source._angle_bits.fill_(0)
    assert source.add_(torch.zeros(1), 1.0).item() == pytest.approx(math.sqrt(2 * 63 * math.log(2)))
    source._radius_bits.fill_(0)
    assert math.isfinite(source.add_(torch.zeros(1), 1.0).item())


@catches("noise from --seed", *bugs.NOISE_FROM_THE_SEED)
def test_noise_does_not_follow_any_seed_and_comes_from_the_operating_system(monkeypatch):
    def seeded():
        torch.manual_seed(0)
        np.random.seed(0)
        return draws(1_000)

    assert not torch.equal(seeded(), seeded())
    asked = []
    monkeypatch.setattr(noise.secrets, "token_bytes", lambda size: asked.append(size) or bytes(size))
    assert torch.equal(seeded(), seeded())  # all of its randomness is the operating system's ...
    assert min(asked) >= 16  # ... and at least 128 bits


def test_noise_on_a_gpu_sums_streams_with_different_keys(monkeypatch):
    """Without a GPU: its code, with generators of the CPU."""
    keys = []

    class Generator(torch.Generator):
        def __new__(cls, device):
            return super().__new__(cls)

        def manual_seed(self, key):
            keys.append(key)
            return super().manual_seed(key % 2**63)

    monkeypatch.setattr(torch, "Generator", Generator)
    total = GaussianNoise(torch.device("cuda")).add_(torch.zeros(200_000), 3.0)
    assert len(set(keys)) == 4 and max(keys) > 2**40
    assert within(total.var().item(), 9, 9 * math.sqrt(2 / len(total)))
    assert stats.kstest(total.numpy() / 3, "norm").pvalue > 1e-9


# --- secure noise -------------------------------------------------------------------------------------


def test_secure_noise_is_normal_of_the_same_scale():
    noise = draws(400_000, std=0.5, source=GaussianNoise(torch.device("cpu"), secure=True))
    assert stats.kstest(noise / 0.5, "norm").statistic < 6 * 0.27 / math.sqrt(len(noise)) + 1e-3
    assert within(noise.var(), 0.25, 0.25 * math.sqrt(2 / len(noise)))


@catches("hardened noise that is not", "mechanism.noise.GaussianNoise.__init__", "4 if secure else 1", "1")
def test_secure_noise_sums_four_independent_draws(monkeypatch):
    source = GaussianNoise(torch.device("cpu"), secure=True)
    pairs, parts = source._add_pairs, []

    def watched(total, std):
        before = total.clone()
        pairs(total, std)
        parts.append((total - before).numpy())
        return total

    source._add_pairs = watched
    total = source.add_(torch.full((20_000,), 7.0), 2.0).numpy()
    assert len(parts) == 4 and np.abs(np.corrcoef(parts) - np.eye(4)).max() < 6 / math.sqrt(20_000)
    assert np.allclose(total - 7, sum(parts), atol=1e-5)
    assert all(within(part.std(), 1.0, 1 / math.sqrt(40_000)) for part in parts)


def test_secure_noise_reaches_numbers_that_one_draw_cannot():
    """Radius and angle of Box-Muller leave gaps among float32 numbers; the sum of four draws fills them."""
    one, four = GaussianNoise(torch.device("cpu")), GaussianNoise(torch.device("cpu"), secure=True)
    assert np.unique(draws(1_000_000, source=four)).size > np.unique(draws(1_000_000, source=one)).size * 0.99


def test_secure_noise_comes_from_the_cipher_on_any_device(monkeypatch):
    monkeypatch.setattr(torch, "Generator", None)  # no device generator takes part
    source = GaussianNoise(torch.device("cuda"), secure=True)
    assert draws(1_000, source=source).std() > 0.5


def test_trainer_hardens_the_noise_by_option(tmp_path):
    trainer = make_trainer(tmp_path, privacy={"secure_noise": True})
    trainer.train()
    assert trainer.optimizer.optimizer.noise.num_draws == 4 and trainer.privacy_report()["secure_noise"] is True
