"""Keep the random numbers inside the model secret while it trains: dropout masks above all.

Guarantees: while a private run trains, every global generator that a model may use holds a state from the operating system.
States differ between processes and runs, and are never saved.

Why: if masks followed from `--seed` and the number of sampled authors, an attacker could compute them, and one author more or
less would change the masks of all others. Neighboring data sets (one author added or removed) would then differ in every author's
gradient, and the sensitivity of a clipped sum would no longer be the clip norm.

Not protected: a Mersenne Twister (torch on the CPU, Python's `random`, NumPy) can be reconstructed from its outputs. It suffices
here, as masks are never published. Noise and sampling have generators of their own (noise.py, sampling.py).

Example:

    >>> with SecretGenerators([torch.device("cpu")]) as generators:
    ...     model(**batch)
    ...     generators.check()
"""

import random
import secrets
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Optional

import numpy as np
import torch
from transformers import PreTrainedModel

from author_dp.errors import MechanismError

TWISTER_WORDS = 624  # of 32 bits: the complete state of a Mersenne Twister
TWISTER_OFFSET = 24  # bytes before these words, 8 bytes each, in the state of torch's CPU generator


class SecretGenerators:
    """Give all global random generators secret states inside a context; restore the earlier states at its end.

    Guarantee: inside, numbers that torch (on the CPU and on `devices`), `random` and NumPy sample from their global generators do
    not follow from any seed. A data loader that is iterated inside seeds its workers from them.

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
        """Raise MechanismError if one of torch's generators was given another state, by set_seed for instance."""
        if [generator.initial_seed() for generator in self.generators] != self._seeds:
            raise MechanismError(
                "torch's random generators were seeded during training (torch.manual_seed, set_seed, a restored state): dropout "
                "masks would follow from a known seed. Remove the call, from callbacks and the model's code above all"
            )


def sample_generators(devices: Iterable[torch.device], size: int) -> torch.Tensor:
    """Sample `size` uniform numbers from each generator inside a new context; return float64 (generators x size,)."""
    with SecretGenerators(devices) as secret:
        numbers = [torch.rand(size, generator=g, device=g.device).cpu().double() for g in secret.generators]
        others = [[random.random() for _ in range(size)], np.random.random(size).tolist()]
        return torch.cat([*numbers, torch.tensor(others, dtype=torch.float64).flatten()])


def randomize(generator: torch.Generator) -> None:
    """Fill a generator's complete state from the operating system.

    On the CPU `manual_seed` keeps 32 bits, so there the complete state is written. Other devices' generators are counters with a
    64-bit key.
    """
    generator.manual_seed(secrets.randbits(64))
    if generator.device.type == "cpu":
        state = generator.get_state()
        words = state[TWISTER_OFFSET : TWISTER_OFFSET + 8 * TWISTER_WORDS].view(torch.int64)
        words.copy_(torch.from_numpy(np.frombuffer(secrets.token_bytes(4 * TWISTER_WORDS), np.uint32).astype(np.int64)))
        generator.set_state(state)


def default_generators(devices: Iterable[torch.device]) -> list[torch.Generator]:
    """Return the generators that random operations use by default: the CPU's, then that of each device."""
    generators = [torch.default_generator]
    for device in sorted({device for device in devices if device.type != "cpu"}, key=str):
        module = torch.get_device_module(device)
        if device.type == "mps":
            generators.append(module._get_default_mps_generator())
        else:
            generators.append(module.default_generators[module.current_device() if device.index is None else device.index])
    return generators


def set_up_secret_generators(
    model: PreTrainedModel, device: torch.device, disable_dp: bool
) -> AbstractContextManager[Optional[SecretGenerators]]:
    """Return a context that makes random numbers inside the model secret; one without effect if `disable_dp`."""
    if disable_dp:
        return nullcontext()
    return SecretGenerators({device, *(parameter.device for parameter in model.parameters())})
