"""What checks of a model have in common: tokens, the length of samples, perturbed weights, and errors of the model's code.

Checks call the user's model on random tokens, never on the user's texts, in a mode of models/modes.py. They compare in float32,
in training mode and, but for the check of random operations, without dropout. All is restored at the end.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Optional

import torch
from torch import nn

from author_dp.errors import UserError, first_line
from author_dp.mechanism.fsdp import local_shard

MODEL_CODE_ERRORS = (RuntimeError, ValueError, TypeError, KeyError, IndexError, AttributeError, NotImplementedError)
DEFAULT_LEN = 128  # tokens of the longest sample where nothing says how long samples are
MIN_LEN = 4  # tokens of the longest sample: a check cuts shorter samples from it


def resolve_sequence_len(model: Any, sequence_len: Optional[int]) -> int:
    """Return the length of the longest sample in tokens; by default 128, or fewer where the model has fewer positions."""
    if sequence_len:
        return max(MIN_LEN, sequence_len)
    return min(getattr(model.config, "max_position_embeddings", None) or DEFAULT_LEN, DEFAULT_LEN)


def random_tokens(model: Any, num_tokens: int, seed: int) -> torch.Tensor:
    """Return random token ids (num_tokens,), none of them special: an image token would need an image."""
    vocab_size = min(len(model.get_input_embeddings().weight), model.config.get_text_config().vocab_size)
    special = {value for name, value in model.config.to_dict().items() if "token" in name and isinstance(value, int)}
    choices = torch.tensor([i for i in range(min(vocab_size, 2**12)) if i not in special])
    ids = choices[torch.randint(len(choices), (num_tokens,), generator=torch.Generator().manual_seed(seed))]
    return ids.to(next(model.parameters()).device)


@contextmanager
def model_errors_as_user_error(problem: str) -> Iterator[None]:
    """Turn an exception of the model's own code into a UserError that says what to change."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except MODEL_CODE_ERRORS as error:
        raise UserError(f"{problem} ({first_line(error)[:200]})") from error


# --- states of the model --------------------------------------------------------------------------------


@contextmanager
def perturb_zero_params(model: nn.Module) -> Iterator[None]:
    """Temporarily perturb all-zero parameters: LoRA's B starts at zero, which would hide A's gradient."""
    trainable = [local_shard(parameter) for parameter in model.parameters() if parameter.requires_grad]
    zeros = [parameter for parameter in trainable if not parameter.any()]
    generator = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for parameter in zeros:
                parameter.copy_(torch.empty(parameter.shape).normal_(std=0.02, generator=generator))
        yield
    finally:
        with torch.no_grad():
            for parameter in zeros:
                parameter.zero_()
