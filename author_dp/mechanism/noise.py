"""Gaussian noise that hides people: drawn from keys of the operating system, three times as fast as by numpy.

Promise: the draws are independent N(0, std^2) as far as anybody can tell who does not hold the keys. The keys have at least
128 bits, come from the operating system, never from --seed, differ between processes and runs, and are never saved.

torch's and numpy's own generators will not do on a CPU: seeding torch's keeps 32 bits, its Mersenne twister can be
reconstructed from noise seen where the gradient is zero, and numpy's normals take three times as long as these.

Example:

    >>> NoiseSource(torch.device("cpu")).add_(torch.zeros(1_000), std=0.5)

References:
    [1] Box and Muller 1958, A Note on the Generation of Random Normal Deviates
    [2] NIST SP 800-38A, section 6.5 (AES in counter mode: a stream cipher, hence a generator of secret bits)
    [3] Mironov 2012, On Significance of the Least Significant Bits for Differential Privacy
    [4] Holohan and Braghin 2021, Secure Random Sampling in Differential Privacy, arXiv 2107.10138
"""

import math
import secrets

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from author_dp.accounting.banded_mf import step_noise_std

SECURE_PAIRS = 2**17  # normals are made two at a time, so many pairs at once: what stays in the cache


class GaussianNoise:
    """Standard normal noise for one process.

    On the CPU: AES-128 in counter mode [2], whose bits the Box-Muller transform [1] makes normal; 63 bits of radius reach
    9.3 standard deviations. Elsewhere: the scaled sum of four streams of the device's own generator, each with a key of
    64 bits, which is all that such a generator takes. Neither is hardened against an attacker who studies the low-order
    bits of the noise (Mironov 2012).

    With `secure`, on any device: half the sum of four such draws on the CPU, as in Opacus' secure mode. The floating-point
    numbers that one draw cannot reach, from which [3] tells what the noise was added to, are reached by sums of several [4].

    Args:
        device: where the noise is wanted.
        secure: harden the noise, at four times the cost on a CPU and more elsewhere.
    """

    def __init__(self, device: torch.device, secure: bool = False):
        self.draws = 4 if secure else 1
        on_cpu = secure or device.type == "cpu"
        self.chunk_size = 2 * SECURE_PAIRS if on_cpu else 2**26  # that `add_` takes at once
        self._generators = [] if on_cpu else [torch.Generator(device) for _ in range(4)]
        for generator in self._generators:
            generator.manual_seed(secrets.randbits(64))
        if on_cpu:
            cipher = Cipher(algorithms.AES128(secrets.token_bytes(16)), modes.CTR(bytes(16)))
            self._stream = cipher.encryptor()  # what it makes of zeros are its secret bits
            self._zeros = bytes(12 * SECURE_PAIRS)
            bits = bytearray(len(self._zeros) + 15)  # the cipher wants room for a block
            self._bits = memoryview(bits)
            self._for_radius = torch.frombuffer(bits, dtype=torch.int64, count=SECURE_PAIRS)
            self._for_angle = torch.frombuffer(bits, dtype=torch.int32, count=SECURE_PAIRS, offset=8 * SECURE_PAIRS)
            self._radius, self._cosine, self._sine = torch.empty(3, SECURE_PAIRS)

    def add_(self, total: torch.Tensor, std: float) -> torch.Tensor:
        """Add independent N(0, std^2) draws to each of the flat float32 `total`, (at most `chunk_size`,), in place."""
        if self.draws > 1:  # summed before they meet what they hide, or that would be rounded between them
            noise = torch.zeros(len(total))
            for _ in range(self.draws):
                self._add_pairs(noise, std / math.sqrt(self.draws))
            return total.add_(noise.to(total.device))
        if not self._generators:
            return self._add_pairs(total, std)
        for generator in self._generators:
            total.add_(torch.empty_like(total).normal_(std=std / 2, generator=generator))
        return total

    def _add_pairs(self, total: torch.Tensor, std: float) -> torch.Tensor:
        """r cos(t), r sin(t) are independent normals for r = sqrt(-2 log u), u uniform in (0, 1], t in [-pi, pi) [1]."""
        self._stream.update_into(self._zeros, self._bits)
        radius = self._radius.copy_(self._for_radius).abs_().clamp_(min=0.5).mul_(2.0**-63)  # u
        radius.log_().mul_(-2 * std * std).sqrt_()
        angle = self._sine.copy_(self._for_angle).mul_(math.pi * 2.0**-31)
        torch.cos(angle, out=self._cosine)
        angle.sin_()
        first, second = total[:SECURE_PAIRS], total[SECURE_PAIRS:]
        first.addcmul_(radius[: len(first)], self._cosine[: len(first)])
        second.addcmul_(radius[: len(second)], self._sine[: len(second)])
        return total


class BandMFNoise:
    """The noise of one training in one process' slice of the sums; it holds the last b - 1 of it, secret, in memory only.

    Args:
        coefficients: (bands,), two or more.
        size: of the slice.
        device: where the sums are.
    """

    def __init__(self, coefficients: np.ndarray, size: int, device: torch.device):
        self.coefficients = coefficients
        self.first, *self.rest = coefficients.tolist()
        self.past = torch.zeros(len(self.rest), size, device=device)
        self.steps = 0

    def add_(self, total: torch.Tensor, source: GaussianNoise, std: float) -> torch.Tensor:
        """Add the noise of the next step to `total`, float32 (size,), in place; std is sigma C."""
        places = [(self.steps - lag) % len(self.past) for lag in range(1, len(self.past) + 1)]  # of w_{t-1}, w_{t-2}, ...
        for total_part, past in zip(total.split(source.chunk_size), self.past.split(source.chunk_size, dim=1)):
            noise = source.add_(torch.zeros_like(total_part), std)
            for place, coefficient in zip(places, self.rest):
                noise.sub_(past[place], alpha=coefficient)
            noise.div_(self.first)
            past[self.steps % len(past)] = noise  # in the place of the oldest one
            total_part.add_(noise)
        self.steps += 1
        return total

    @property
    def variance(self) -> float:
        """Variance of the last step's noise, in units of (sigma C)^2."""
        return step_noise_std(self.coefficients, self.steps) ** 2
