"""Check that random operations inside the model treat each sample independently of the others.

Clipping bounds what one author does to the sum only if the author's dropout masks have the same distribution whoever else is in
the batch, and if nobody else's masks hang on them. A coin that all samples share (LayerDrop, a mask for the whole batch), a
permutation or a choice across samples, and numbers from `random` or NumPy break that.

How: the model runs in training mode under a dispatch mode that sees every random operation of torch, whatever calls it.

1. With two and with three copies of one sample the same operations must occur, each with a dimension as long as the samples. One
   that draws the same numbers for all is accepted where its lowest and highest outcome give the same logits (a LayerDrop of 0).
2. With fixed random numbers for a few samples, their logits must not change with the random numbers and tokens of the others.
3. Python's `random`, NumPy and generators of the model's own must not be used.

Not found: an operation that draws inside a kernel without being marked as random in torch, and a dropout rate that hangs on the
other samples so weakly that no logit shows it.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from author_dp.errors import UserError

FEW, MANY, BATCH = 2, 3, 5  # numbers of samples
KEPT = (1, 4)  # samples of BATCH whose random numbers stay the same
ROUNDS = 8  # of other random numbers and tokens for the samples that are not kept
FILLABLE = ("bernoulli", "rand.", "rand_like", "uniform")  # operations with a lowest and a highest outcome
BELOW_ONE = 1 - 2.0**-24  # the highest outcome of a uniform number

REMEDY = "set it to 0 in config.json (or in the --lora options), or choose another model"


class RandomOp(NamedTuple):
    """A random operation as it ran."""

    name: str
    scalars: tuple[Any, ...]  # arguments that are neither tensors nor sizes
    shape: tuple[int, ...]  # of what it drew
    has_generator: bool


class RandomOps(TorchDispatchMode):
    """Record the random operations of a forward, and control what they draw.

    Args:
        sample_dims: of each operation in order, the dimension of the samples; None where all share what is drawn. Not given,
            operations are recorded only.
        others: seed of the samples that are not kept.
        fill: outcome of what all samples share, 0 for the lowest and 1 for the highest; None leaves it random.
    """

    def __init__(self, sample_dims: Optional[list[Optional[int]]] = None, others: int = 0, fill: Optional[int] = None):
        super().__init__()
        self.ops: list[RandomOp] = []
        self.sample_dims, self.others, self.fill = sample_dims, others, fill

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Optional[dict] = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        index = len(self.ops)
        torch.manual_seed(2 * index)
        drawn = func(*args, **kwargs)
        main = drawn[0] if isinstance(drawn, tuple | list) else drawn
        scalars = tuple(a for a in (*args, *kwargs.values()) if isinstance(a, bool | int | float))
        has_generator = any(isinstance(value, torch.Generator) for value in (*args, *kwargs.values()))
        self.ops.append(RandomOp(str(func), scalars, tuple(main.shape), has_generator))
        if self.sample_dims is None or index >= len(self.sample_dims):
            return drawn
        dim = self.sample_dims[index]
        if dim is None and self.fill is not None:
            low, high = scalars[:2] if "uniform" in str(func) and len(scalars) > 1 else (0, 1)
            main.fill_(low + (high - low) * (self.fill if "bernoulli" in str(func) else self.fill * BELOW_ONE))
        if dim is None or not self.others:
            return drawn
        if main.shape[dim] % BATCH:  # experts, who see some of the tokens only
            raise refusal(self.ops[-1], "draws numbers in no proportion to the number of samples")
        kept = main.unflatten(dim, (BATCH, -1)).index_select(dim, torch.tensor(KEPT, device=main.device))
        torch.manual_seed(2 * (index + 10_000 * self.others) + 1)
        again = func(*args, **kwargs)
        other = again[0] if isinstance(again, tuple | list) else again
        other.unflatten(dim, (BATCH, -1)).index_copy_(dim, torch.tensor(KEPT, device=main.device), kept)
        return again


def check_random_ops(model: Any, ids: torch.Tensor, tolerance: float) -> None:
    """Raise UserError where a random operation is not independent between samples.

    Args:
        model: any mode; its parameters, buffers and modes and all global generators are as before, afterwards.
        ids: token ids, int64 (BATCH, tokens).
        tolerance: relative difference of logits that rounding may cause.
    """
    with training_mode(model), torch.no_grad():
        few, many = (record(model, ids[:1].expand(count, -1)) for count in (FEW, MANY))
        if not few and not many:
            return
        dims = [sample_dim(*pair) for pair in zip_ops(few, many)]
        if None in dims:
            shared = next(op for op, dim in zip(few, dims) if dim is None)
            low, high = (logits(model, ids[:FEW], RandomOps(dims, fill=fill)) for fill in (0, 1))
            fillable = all(any(word in op.name for word in FILLABLE) for op, dim in zip(few, dims) if dim is None)
            if not fillable or not close(low, high, tolerance):
                raise refusal(shared, "shares random numbers among all samples of a batch, as LayerDrop does")
        kept = []
        for round_ in range(1, ROUNDS + 1):
            changed = ids.roll(round_)
            changed[list(KEPT)] = ids[list(KEPT)]
            mode = RandomOps(dims, others=round_)
            kept.append(logits(model, changed, mode)[list(KEPT)])
            zip_ops(few, mode.ops)
        if not all(close(kept[0], other, tolerance) for other in kept[1:]):
            raise refusal(few[0], "lets random numbers or texts of other samples change a sample's logits")


def record(model: Any, ids: torch.Tensor) -> list[RandomOp]:
    """Return the random operations of a forward; refuse numbers that come from elsewhere than torch's global generators."""
    before, mode = other_states(), RandomOps()
    logits(model, ids, mode)
    if other_states() != before:
        words = "in training this model draws from Python's random or NumPy, for all samples at once, as LayerDrop does"
        raise UserError(f"--model_name: {words}: {REMEDY}")
    if own := next((op for op in mode.ops if op.has_generator), None):
        raise refusal(own, "draws from a generator of the model's own, which is not secret")
    return mode.ops


def other_states() -> tuple[Any, str]:
    """Return the states of the generators of Python and NumPy, to be compared."""
    return random.getstate(), str(np.random.get_state(legacy=False))


def logits(model: Any, ids: torch.Tensor, mode: RandomOps) -> torch.Tensor:
    """Return the logits of a forward under `mode`, (samples, tokens, vocabulary)."""
    with mode:
        return model(input_ids=ids).logits


def zip_ops(few: list[RandomOp], other: list[RandomOp]) -> Iterator[tuple[RandomOp, RandomOp]]:
    """Pair the operations of two forwards; refuse those that differ in more than sizes."""
    for one, two in zip(few, other):
        if one.name != two.name or one.scalars != two.scalars or len(one.shape) != len(two.shape):
            raise refusal(one, "draws otherwise for other samples, as a permutation or a choice across samples does")
    if len(few) != len(other):
        raise refusal(
            (few or other)[-1], "draws more or less often for other samples or after other random numbers, as LayerDrop does"
        )
    yield from zip(few, other)


def sample_dim(few: RandomOp, many: RandomOp) -> Optional[int]:
    """Return the dimension that grows with the number of samples; None where the operation draws the same for all."""
    changed = [dim for dim, sizes in enumerate(zip(few.shape, many.shape)) if sizes[0] != sizes[1]]
    if not changed:
        return None
    if len(changed) > 1 or few.shape[changed[0]] * MANY != many.shape[changed[0]] * FEW:
        raise refusal(few, "draws numbers in no proportion to the number of samples")
    return changed[0]


def close(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    return bool((one - other).norm() <= tolerance * one.norm())


def refusal(op: RandomOp, problem: str) -> UserError:
    return UserError(f"--model_name: in training this model {problem} ({op.name}): {REMEDY}")


@contextmanager
def training_mode(model: Any) -> Iterator[None]:
    """Put the model in training mode; at the end modes, buffers and the states of all global generators are as before."""
    modes = {module: module.training for module in model.modules()}
    buffers = [(module, name, b, b.clone()) for module in modes for name, b in module._buffers.items() if b is not None]
    python, numpy = random.getstate(), np.random.get_state()
    device = next(model.parameters()).device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        try:
            model.train()
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
            for module, mode in modes.items():
                module.training = mode
            with torch.no_grad():
                for module, name, buffer, value in buffers:
                    buffer.copy_(value)
                    module._buffers[name] = buffer
