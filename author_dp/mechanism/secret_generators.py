"""Keep the random numbers inside the model secret while it trains: dropout masks above all.

If masks follow from `--seed` and the number of sampled authors, an attacker can compute them, and one author more or less changes
the masks of all others. Then neighboring data sets differ in every author's
gradient, and the sensitivity of a clipped sum is no longer the clip norm. So while a private run trains, every generator that a
model may use holds a state from the operating system. It differs between processes and runs, and it is never saved.

A Mersenne Twister (torch on the CPU, Python's `random`, NumPy) can be reconstructed from its outputs. That is good enough here,
as masks are never published. Noise and sampling have generators of their own (noise.py, mechanism.py).

Example:

    >>> with SecretGenerators([torch.device("cpu")]) as generators:
    ...     model(**batch)
    ...     generators.check()
"""

import random
import secrets
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

from author_dp.errors import MechanismError

TWISTER_WORDS = 624  # of 32 bits: the whole state of a Mersenne Twister
TWISTER_OFFSET = 24  # bytes before these words, 8 bytes each, in the state of torch's CPU generator


class SecretGenerators:
    """Context in which all global random generators hold secret states; the earlier states come back at its end.

    Guarantee: inside, what torch (on the CPU and on `devices`), `random` and NumPy draw from their global generators does not
    follow from any seed. A data loader that is iterated inside seeds its workers from them.

    Args:
        devices: of the model.
    """

    def __init__(self, devices: Iterable[torch.device]):
        self.generators = default_generators(devices)
        self._seeds: list[int] = []
        self._earlier: tuple[Any, ...] = ()

    def __enter__(self) -> "SecretGenerators":
        self._earlier = random.getstate(), np.random.get_state(), [generator.get_state() for generator in self.generators]
        random.seed(secrets.token_bytes(4 * TWISTER_WORDS))
        np.random.set_state(("MT19937", np.frombuffer(secrets.token_bytes(4 * TWISTER_WORDS), np.uint32), TWISTER_WORDS, 0, 0.0))
        for generator in self.generators:
            randomize(generator)
        self._seeds = [generator.initial_seed() for generator in self.generators]
        return self

    def __exit__(self, *_: object) -> None:
        python, numpy, states = self._earlier
        random.setstate(python)
        np.random.set_state(numpy)
        for generator, state in zip(self.generators, states):
            generator.set_state(state)

    def check(self) -> None:
        """Raise MechanismError where something has put another state into a generator of torch, such as a call of set_seed."""
        if [generator.initial_seed() for generator in self.generators] != self._seeds:
            raise MechanismError(
                "torch's random generators were seeded during training (torch.manual_seed, set_seed, a restored state): dropout "
                "masks would follow from a known seed"
            )


def sample_generators(devices: Iterable[torch.device], count: int) -> torch.Tensor:
    """Return `count` uniform numbers of each generator inside a new context, float64 (generators x count,)."""
    with SecretGenerators(devices) as secret:
        draws = [
            torch.rand(count, generator=generator, device=generator.device).cpu().double() for generator in secret.generators
        ]
        others = [[random.random() for _ in range(count)], np.random.random(count).tolist()]
        return torch.cat([*draws, torch.tensor(others, dtype=torch.float64).flatten()])


def randomize(generator: torch.Generator) -> None:
    """Fill a generator's whole state from the operating system.

    `manual_seed` keeps 32 bits on the CPU, so there the state is written as a whole. Other devices' generators are counters with
    a 64-bit key.
    """
    generator.manual_seed(secrets.randbits(64))
    if generator.device.type == "cpu":
        state = generator.get_state()
        words = state[TWISTER_OFFSET : TWISTER_OFFSET + 8 * TWISTER_WORDS].view(torch.int64)
        words.copy_(torch.from_numpy(np.frombuffer(secrets.token_bytes(4 * TWISTER_WORDS), np.uint32).astype(np.int64)))
        generator.set_state(state)


def default_generators(devices: Iterable[torch.device]) -> list[torch.Generator]:
    """Return the generators that random operations use by default: the CPU's first, then that of each device."""
    found = [torch.default_generator]
    for device in sorted({device for device in devices if device.type != "cpu"}, key=str):
        module = torch.get_device_module(device)
        if device.type == "mps":
            found.append(module._get_default_mps_generator())
        else:
            found.append(module.default_generators[module.current_device() if device.index is None else device.index])
    return found
