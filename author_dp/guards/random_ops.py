"""Check that random operations inside the model treat each sample independently of the others.

Clipping bounds what one author does to the sum only if the author's dropout masks have the same distribution whoever else is in
the batch, and if nobody else's masks depend on that author. A coin that all samples share breaks that (LayerDrop, a mask for the
whole batch), and so do a permutation or a choice across samples, and numbers from `random` or NumPy.

How: the model runs in training mode, forward and backward, under a dispatch mode that sees every random operation of torch.

1. Two and three copies of one sample must cause the same operations, each with one dimension proportional to the number of
   samples; checked for short samples and for the longest of the run. An operation that draws the same for all is accepted where
   its lowest and highest outcome give the same logits (a LayerDrop of 0).
2. With fixed random numbers for a few samples, their logits and gradients must not change with the random numbers and tokens of
   the others.
3. Python's `random`, NumPy and generators of the model's own must not be used, and nothing may seed torch's.

Not found: an operation that draws inside a kernel without being marked as random in torch, what begins after many steps or with
larger batches than here, and generators that a module hides (in a closure or a list).
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from author_dp.errors import UserError
from author_dp.mechanism.secret_generators import default_generators

FEW, MANY, BATCH = 2, 3, 7  # numbers of samples
KEPT = (1, 5)  # samples of BATCH whose random numbers stay the same
ROUNDS = 5  # of other random numbers and tokens for the samples that are not kept
FILLABLE = ("bernoulli", "rand.", "rand_like", "uniform")  # operations with a lowest and a highest outcome
BELOW_ONE = 1 - 2.0**-24  # the highest outcome of a uniform number
SEED = 2**59  # the first of those that are set here: no model sets it by chance
GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)

SHARED_OPS = "shares random numbers among all samples of a batch, as LayerDrop does"
REMEDY = "set the dropout or LayerDrop rate to 0 in config.json (or --lora_dropout 0), or choose another --model_name"


class RandomOp(NamedTuple):
    """A random operation as it ran."""

    name: str
    scalars: tuple[Any, ...]  # arguments that are neither tensors nor sizes
    shape: tuple[int, ...]  # of what it drew
    has_generator: bool
    is_seeded: bool  # whether something had put another state into the generators


class RandomOpMode(TorchDispatchMode):
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
        self._seeds: set[int] = set()  # those set here, which checkpointed layers restore

    def __enter__(self) -> Any:
        self._set_seed(0)
        return super().__enter__()

    def _set_seed(self, number: int) -> None:
        self._seeds.add(SEED + number)
        torch.manual_seed(SEED + number)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Optional[dict] = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        index = len(self.ops)
        seen = {generator.initial_seed() for generator in default_generators(t.device for t in args if torch.is_tensor(t))}
        is_seeded = not seen <= self._seeds  # by the model
        self._set_seed(2 * index)
        drawn = func(*args, **kwargs)
        main = drawn[0] if isinstance(drawn, tuple | list) else drawn
        scalars = tuple(a for a in (*args, *kwargs.values()) if isinstance(a, bool | int | float))
        has_generator = any(isinstance(value, torch.Generator) for value in (*args, *kwargs.values()))
        self.ops.append(RandomOp(str(func), scalars, tuple(main.shape), has_generator, is_seeded))
        if self.sample_dims is None or index >= len(self.sample_dims):
            return drawn
        dim = self.sample_dims[index]
        if dim is None and self.fill is not None:
            low, high = scalars[:2] if "uniform" in str(func) and len(scalars) > 1 else (0, 1)
            main.fill_(low + (high - low) * (self.fill if "bernoulli" in str(func) else self.fill * BELOW_ONE))
        if dim is None or not self.others:
            return drawn
        if main.shape[dim] % BATCH:  # experts, who see some of the tokens only
            raise refusal_error(self.ops[-1], "draws numbers in no proportion to the number of samples")
        kept = main.unflatten(dim, (BATCH, -1)).index_select(dim, torch.tensor(KEPT, device=main.device))
        self._set_seed(2 * (index + 10_000 * self.others) + 1)
        again = func(*args, **kwargs)
        other = again[0] if isinstance(again, tuple | list) else again
        other.unflatten(dim, (BATCH, -1)).index_copy_(dim, torch.tensor(KEPT, device=main.device), kept)
        return again


class ModelCall(NamedTuple):
    """How the run calls its model."""

    model: Any
    bf16: bool  # under autocast

    def __call__(self, ids: torch.Tensor, mode: RandomOpMode, backward: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """Return logits, and gradients at the output of the input embeddings, float32 (samples, ...) each, under `mode`."""
        embedded: list[torch.Tensor] = []

        def require_grad(layer: Any, args: tuple, output: torch.Tensor) -> torch.Tensor:
            embedded.append(output if output.requires_grad else output.detach().requires_grad_())
            return embedded[-1].clone()  # some models scale it in place, which a leaf does not allow

        hook = self.model.get_input_embeddings().register_forward_hook(require_grad)
        autocast = torch.autocast(ids.device.type, torch.bfloat16, enabled=self.bf16)
        try:
            with mode, torch.enable_grad(), autocast:
                logits = self.model(input_ids=ids).logits.float()
                found = torch.autograd.grad(logits.square().sum(), embedded[:1], allow_unused=True) if backward else (None,)
        finally:
            hook.remove()
        return logits.detach(), torch.zeros_like(logits) if found[0] is None else found[0].float()


def check_random_ops(call: ModelCall, ids: torch.Tensor, longest: int, tolerance: float) -> None:
    """Raise UserError where a random operation is not independent between samples.

    Args:
        call: the model in any mode; its parameters, buffers and modes and all global generators are as before, afterwards.
        ids: token ids, int64 (BATCH, tokens).
        longest: tokens of the longest sample of the run.
        tolerance: relative difference of logits that rounding may cause.
    """
    check_own_generators(call.model)
    with training_mode(call.model):
        copies = ids[:1, torch.arange(longest, device=ids.device) % ids.shape[1]]  # (1, longest)
        long = [record_random_ops(call, copies.expand(count, -1), backward=False) for count in (FEW, MANY)]
        few, many = (record_random_ops(call, ids[:1].expand(count, -1)) for count in (FEW, MANY))
        dims = sample_dims(few, many)
        if None in sample_dims(*long) + dims:
            check_shared_ops(call, ids, few, dims, tolerance)
        if few:
            check_independence(call, ids, few, dims, tolerance)


def check_own_generators(model: Any) -> None:
    """Raise UserError where a module holds a random generator: its numbers are not secret."""
    for name, module in model.named_modules():
        if any(isinstance(value, GENERATORS) for value in vars(module).values()):
            raise UserError(
                f"--model_name: {name or 'the model'} holds a random generator, which is not secret: remove it from the model's "
                "code, or choose another --model_name"
            )


def check_shared_ops(
    call: ModelCall, ids: torch.Tensor, few: list[RandomOp], dims: list[Optional[int]], tolerance: float
) -> None:
    """Raise UserError where the outcome of an operation that all samples share changes logits or gradients."""
    shared = [op for op, dim in zip(few, dims) if dim is None]
    if not shared or not all(any(word in op.name for word in FILLABLE) for op in shared):
        raise refusal_error(
            (shared or few)[0] if few else None, "shares random numbers among all samples of a batch, as LayerDrop does"
        )
    low, high = (call(ids[:FEW], RandomOpMode(dims, fill=fill)) for fill in (0, 1))
    if not all(is_close(*pair, tolerance) for pair in zip(low, high)):
        raise refusal_error(shared[0], SHARED_OPS)


def check_independence(
    call: ModelCall, ids: torch.Tensor, few: list[RandomOp], dims: list[Optional[int]], tolerance: float
) -> None:
    """Raise UserError where random numbers or texts of other samples change the logits or gradients of those that are KEPT."""
    kept = []
    for round_ in range(1, ROUNDS + 1):
        changed = ids.roll(round_, 0)
        changed[list(KEPT)] = ids[list(KEPT)]
        mode = RandomOpMode(dims, others=round_)
        kept.append([values[list(KEPT)] for values in call(changed, mode)])
        check_same_ops(few, mode.ops)
    if not all(is_close(*pair, tolerance) for other in kept[1:] for pair in zip(kept[0], other)):
        raise refusal_error(few[0], "lets random numbers or texts of other samples change a sample's logits")


def record_random_ops(call: ModelCall, ids: torch.Tensor, backward: bool = True) -> list[RandomOp]:
    """Return the random operations of a call; refuse numbers that come from elsewhere than torch's global generators."""
    before, mode = other_states(), RandomOpMode()
    call(ids, mode, backward)
    if other_states() != before:
        words = "in training this model draws from Python's random or NumPy, for all samples at once, as LayerDrop does"
        raise UserError(f"--model_name: {words}: {REMEDY}")
    if own := next((op for op in mode.ops if op.has_generator), None):
        raise refusal_error(own, "draws from a generator of the model's own, which is not secret")
    if seeded := next((op for op in mode.ops if op.is_seeded), None):
        raise refusal_error(seeded, "seeds torch's random generators, so that its random numbers are not secret")
    return mode.ops


def other_states() -> tuple[Any, str]:
    """Return the states of the generators of Python and NumPy, to be compared."""
    return random.getstate(), str(np.random.get_state(legacy=False))


def check_same_ops(few: list[RandomOp], other: list[RandomOp]) -> None:
    """Refuse operations of two calls that differ in more than sizes."""
    for one, two in zip(few, other):
        if one.name != two.name or one.scalars != two.scalars or len(one.shape) != len(two.shape):
            raise refusal_error(one, "draws otherwise for other samples, as a permutation or a choice across samples does")
    if len(few) != len(other):
        raise refusal_error((few or other)[-1], "draws more or less often after other random numbers, as LayerDrop does")


def sample_dims(few: list[RandomOp], many: list[RandomOp]) -> list[Optional[int]]:
    """Return of each operation the dimension that grows with the samples; None where it draws the same for all."""
    check_same_ops(few, many)
    found: list[Optional[int]] = []
    for one, two in zip(few, many):
        changed = [dim for dim, sizes in enumerate(zip(one.shape, two.shape)) if sizes[0] != sizes[1]]
        if len(changed) > 1 or (changed and one.shape[changed[0]] * MANY != two.shape[changed[0]] * FEW):
            raise refusal_error(one, "draws numbers in no proportion to the number of samples")
        found.append(changed[0] if changed else None)
    return found


def is_close(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    return bool((one - other).norm() <= tolerance * one.norm())


def refusal_error(op: Optional[RandomOp], problem: str) -> UserError:
    name = "" if op is None else f" ({op.name})"
    return UserError(f"--model_name: in training this model {problem}{name}: {REMEDY}")


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
