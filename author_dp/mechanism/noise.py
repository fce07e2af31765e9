"""Draw Gaussian noise with secret keys, independent or correlated over steps.

Guarantees: to anyone without the keys, the draws look like independent N(0, std^2). Keys have at least 128 bits and come from the
operating system, never from --seed. They differ between processes and runs, and are never saved.

Not protected: the noise is rounded to float32. Without `secure`, low-order bits may tell what it was added to [3].

torch's and NumPy's generators do not suffice on a CPU. Seeding torch's keeps 32 bits, and its Mersenne Twister can be
reconstructed from noise that is seen where the gradient is zero. NumPy's normals take three times as long as these.

Example:

    >>> GaussianNoise(torch.device("cpu")).add_(torch.zeros(1_000), std=0.5)

References:
    [1] Box and Muller 1958, A Note on the Generation of Random Normal Deviates
    [2] NIST SP 800-38A, section 6.5 (AES in counter mode: a stream cipher, hence a generator of secret bits)
    [3] Mironov 2012, On Significance of the Least Significant Bits for Differential Privacy
    [4] Holohan and Braghin 2021, Secure Random Sampling in Differential Privacy, arXiv 2107.10138
    [5] Choquette-Choo et al. 2023, (Amplified) Banded Matrix Factorization, arXiv 2306.08153
"""

import math
import secrets

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes

from author_dp.accounting.banded_mf import banded_step_noise_std

COPIED_AT_ONCE = 2**24  # elements of secure noise that are copied to a device: 64 MB
CHUNK_PAIRS = 2**17  # pairs of normals that are made at once: their memory stays in a CPU's cache


class GaussianNoise:
    """Draw N(0, std^2) noise for one process.

    On the CPU: AES-128 in counter mode [2], whose bits the Box-Muller transform [1] makes normal. 63 bits of radius reach 9.3
    standard deviations. Elsewhere: the scaled sum of four streams of the device's generator, each with a key of 64 bits, which is
    all that such a generator takes. Neither is hardened against an attacker who studies the low-order bits of the noise [3].

    With `secure`, on any device: half the sum of four such draws on the CPU, as in Opacus' secure mode. One draw cannot reach
    every floating-point number, which tells what the noise was added to [3]; sums of several draws reach them [4].

    Args:
        device: of the tensors that noise is added to.
        secure: harden the noise, at four times the cost on a CPU and more elsewhere.
    Attributes:
        num_draws: how many draws are summed.
        chunk_size: elements that `add_` takes at once.
    """

    def __init__(self, device: torch.device, secure: bool = False):
        self.num_draws = 4 if secure else 1
        on_cpu = secure or device.type == "cpu"
        self.chunk_size = 2 * CHUNK_PAIRS if device.type == "cpu" else COPIED_AT_ONCE if secure else 2**26
        self._generators = [] if on_cpu else [torch.Generator(device) for _ in range(4)]
        for generator in self._generators:
            generator.manual_seed(secrets.randbits(64))
        if on_cpu:
            cipher = Cipher(algorithms.AES128(secrets.token_bytes(16)), modes.CTR(bytes(16)))
            self._stream = cipher.encryptor()  # encrypts zeros to secret bits
            self._zeros = bytes(12 * CHUNK_PAIRS)
            bits = bytearray(len(self._zeros) + 15)  # the cipher asks for a block more
            self._bits = memoryview(bits)
            self._radius_bits = torch.frombuffer(bits, dtype=torch.int64, count=CHUNK_PAIRS)
            self._angle_bits = torch.frombuffer(bits, dtype=torch.int32, count=CHUNK_PAIRS, offset=8 * CHUNK_PAIRS)
            self._radius, self._cosine, self._sine = torch.empty(3, CHUNK_PAIRS)

    def add_(self, total: torch.Tensor, std: float) -> torch.Tensor:
        """Add independent N(0, std^2) draws to each element of `total`, in place.

        Args:
            total: flat, float32, (at most `chunk_size`,).
        """
        if self.num_draws > 1:  # summed before they are added to `total`: rounding in between would undo the hardening
            # From pinned memory, which torch reuses once it is copied, the next chunk is drawn while this one is copied.
            noise = torch.zeros(len(total), pin_memory=total.device.type == "cuda")
            for chunk in noise.split(2 * CHUNK_PAIRS):
                for _ in range(self.num_draws):
                    self._add_pairs(chunk, std / math.sqrt(self.num_draws))
            return total.add_(noise.to(total.device, non_blocking=True))
        if not self._generators:
            return self._add_pairs(total, std)
        for generator in self._generators:
            total.add_(torch.empty_like(total).normal_(std=std / 2, generator=generator))
        return total

    def _add_pairs(self, total: torch.Tensor, std: float) -> torch.Tensor:
        """Add one draw by the Box-Muller transform [1].

        r cos(t) and r sin(t) are independent normals for r = sqrt(-2 log u), u uniform in (0, 1], t uniform in [-pi, pi).
        """
        self._stream.update_into(self._zeros, self._bits)
        radius = self._radius.copy_(self._radius_bits).abs_().clamp_(min=0.5).mul_(2.0**-63)  # u
        radius.log_().mul_(-2 * std * std).sqrt_()
        angle = self._sine.copy_(self._angle_bits).mul_(math.pi * 2.0**-31)
        torch.cos(angle, out=self._cosine)
        angle.sin_()
        first_half, second_half = total[:CHUNK_PAIRS], total[CHUNK_PAIRS:]
        first_half.addcmul_(radius[: len(first_half)], self._cosine[: len(first_half)])
        second_half.addcmul_(radius[: len(second_half)], self._sine[: len(second_half)])
        return total


class BandMFNoise:
    """Draw noise that is correlated over the steps of one training, for one process' slice of the sums.

    Guarantee: the noise of steps 0, 1, ... is w = C^-1 z, with z independent N(0, std^2) and C the lower-triangular Toeplitz
    matrix of `coefficients` ([5]; accounting/banded_mf.py has the theorem). The last b - 1 steps of it are kept in memory,
    secret, and never saved.

    Args:
        coefficients: c_0, ..., c_{b-1}, float64 (bands,), two or more.
        size: elements of the slice.
        device: of the sums.
    Attributes:
        steps: taken so far.
    """

    def __init__(self, coefficients: np.ndarray, size: int, device: torch.device):
        self.coefficients = coefficients
        self.past = torch.zeros(len(coefficients) - 1, size, device=device)
        self.steps = 0

    def add_(self, total: torch.Tensor, source: GaussianNoise, std: float) -> torch.Tensor:
        """Add the noise of the next step to `total`, float32 (size,), in place; std is sigma C.

        Solves C w = z by forward substitution: w_t = (z_t - c_1 w_{t-1} - ... - c_{b-1} w_{t-b+1}) / c_0.
        """
        c_0, *lag_coefficients = self.coefficients.tolist()
        rows = [(self.steps - lag) % len(self.past) for lag in range(1, len(self.past) + 1)]  # of w_{t-1}, w_{t-2}, ...
        for chunk, past in zip(total.split(source.chunk_size), self.past.split(source.chunk_size, dim=1)):
            noise = source.add_(torch.zeros_like(chunk), std)
            for row, coefficient in zip(rows, lag_coefficients):
                noise.sub_(past[row], alpha=coefficient)
            noise.div_(c_0)
            past[self.steps % len(past)] = noise  # overwrites the oldest step
            chunk.add_(noise)
        self.steps += 1
        return total

    @property
    def variance(self) -> float:
        """Variance of the last step's noise, in units of (sigma C)^2."""
        return banded_step_noise_std(self.coefficients, self.steps) ** 2
