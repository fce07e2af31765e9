"""Check that random operations inside the model treat each sample independently of the others.

Clipping bounds an author's influence on the sum only if the distribution of the author's dropout masks does not depend on who
else is in the batch, and no other author's masks depend on that author. A random number that all samples share breaks this
(LayerDrop, one mask for the batch). So do a permutation of samples, a choice among them, and Python's `random` or NumPy.

The model runs in training mode, forward and backward, under a dispatch mode that sees each random operation of torch:

1. Two and three copies of one sample must cause the same operations. Each operation must have one dimension proportional to the
   number of samples. This is checked for short samples, and for the longest of the run. An operation that all samples share is
   accepted if its lowest and its highest outcome give the same logits (a LayerDrop of 0).
2. A few samples keep their tokens and random numbers, while those of the other samples change. The logits and gradients of the
   few must not change.
3. Python's `random`, NumPy and generators of the model must not be used, and nothing may seed torch's.

Not found: an operation that generates random numbers inside a kernel without torch's mark for random operations, behavior that
begins after many steps or with larger batches than here, and generators hidden in a closure or a list.
"""

import pickle
import random
from typing import Any, NamedTuple, Optional

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from author_dp.errors import UserError
from author_dp.mechanism.secret_generators import default_generators
from author_dp.models.modes import training_mode

FEW, MORE = 2, 3  # copies of one sample whose operations are compared
BATCH_SIZE = 7  # samples in the test for independence
FIXED_SAMPLES = (1, 5)  # samples of the batch that keep their tokens and random numbers
ROUNDS = 5  # with other tokens and random numbers for the other samples
FILLABLE = ("bernoulli", "rand.", "rand_like", "uniform")  # operations with a lowest and a highest outcome
# Fused kernels of attention generate their masks once more in the backward pass, from a seed that all samples share: a few
# samples cannot keep theirs while the others' change.
ATTENTION = "_scaled_dot_product_"
BELOW_ONE = 1 - 2.0**-24  # highest outcome of a uniform random number
SEED = 2**59  # lowest of the seeds that are set here: no model sets it by chance
GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)

SHARED_OPS = "shares random numbers among all samples of a batch, as LayerDrop does"
WRONG_PROPORTION = "generates random numbers in no proportion to the number of samples"
REMEDY = "Set the dropout or LayerDrop rate to 0 in config.json (or --lora_dropout 0), or choose another --model_name"


class RandomOp(NamedTuple):
    """A random operation as it ran."""

    name: str
    scalars: tuple[Any, ...]  # arguments that are neither tensors nor sizes
    shape: tuple[int, ...]  # of its output
    has_generator: bool
    is_seeded: bool  # whether the model had changed the state of torch's generators


class RandomOpMode(TorchDispatchMode):
    """Record the random operations of a forward pass, and control their outcomes.

    Args:
        sample_dims: for each operation in order, the dimension of the samples; None where all samples share the outcome. By
            default, operations are only recorded.
        other_seed: seed of all samples but FIXED_SAMPLES; 0 leaves their outcomes as they are.
        shared_outcome: outcome of what all samples share, 0 for the lowest and 1 for the highest; None leaves it random.
    """

    def __init__(
        self, sample_dims: Optional[list[Optional[int]]] = None, other_seed: int = 0, shared_outcome: Optional[int] = None
    ):
        super().__init__()
        self.ops: list[RandomOp] = []
        self.sample_dims, self.other_seed, self.shared_outcome = sample_dims, other_seed, shared_outcome
        self._seeds: set[int] = set()  # those set here, which checkpointed layers restore

    def __enter__(self) -> Any:
        self._set_seed(0)
        return super().__enter__()

    def _set_seed(self, offset: int) -> None:
        self._seeds.add(SEED + offset)
        # without an accelerator, torch.manual_seed would only queue calls for one, each with a trace of the stack
        (torch.manual_seed if torch.accelerator.is_available() else torch.default_generator.manual_seed)(SEED + offset)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Optional[dict] = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        index = len(self.ops)
        current_seeds = {g.initial_seed() for g in default_generators(t.device for t in args if torch.is_tensor(t))}
        is_seeded = not current_seeds <= self._seeds  # by the model
        self._set_seed(2 * index)
        output = func(*args, **kwargs)
        tensor = first_tensor(output)
        values = (*args, *kwargs.values())
        scalars = tuple(value for value in values if isinstance(value, bool | int | float))
        has_generator = any(isinstance(value, torch.Generator) for value in values)
        self.ops.append(RandomOp(str(func), scalars, tuple(tensor.shape), has_generator, is_seeded))
        if self.sample_dims is None or index >= len(self.sample_dims):
            return output
        dim = self.sample_dims[index]
        if dim is None:
            self._fill(tensor)
            return output
        if not self.other_seed or ATTENTION in str(func):
            return output
        if tensor.shape[dim] % BATCH_SIZE:  # experts, which see some of the tokens only
            raise random_op_error(self.ops[-1], WRONG_PROPORTION)
        fixed = torch.tensor(FIXED_SAMPLES, device=tensor.device)
        # The mask, too, that dropout on a GPU returns for its backward pass.
        before = [t.unflatten(dim, (BATCH_SIZE, -1)).index_select(dim, fixed) for t in same_shape_tensors(output)]
        self._set_seed(2 * (index + 10_000 * self.other_seed) + 1)
        output = func(*args, **kwargs)
        for t, kept in zip(same_shape_tensors(output), before):
            t.unflatten(dim, (BATCH_SIZE, -1)).index_copy_(dim, fixed, kept)
        return output

    def _fill(self, tensor: torch.Tensor) -> None:
        """Set the output of the last operation to its lowest or highest outcome, if asked for."""
        if self.shared_outcome is None:
            return
        name, scalars = self.ops[-1].name, self.ops[-1].scalars
        low, high = scalars[:2] if "uniform" in name and len(scalars) > 1 else (0, 1)
        tensor.fill_(low + (high - low) * (self.shared_outcome if "bernoulli" in name else self.shared_outcome * BELOW_ONE))


def first_tensor(output: Any) -> torch.Tensor:
    """Return the first tensor of an operation's output."""
    return output[0] if isinstance(output, tuple | list) else output


def same_shape_tensors(output: Any) -> list[torch.Tensor]:
    """Return the tensors of an operation's output that have the shape of the first one."""
    tensors = [t for t in output if torch.is_tensor(t)] if isinstance(output, tuple | list) else [output]
    return [t for t in tensors if t.shape == tensors[0].shape]


class RandomOpModelCall(NamedTuple):
    """How the run calls its model."""

    model: Any
    bf16: bool  # under autocast

    def __call__(self, ids: torch.Tensor, mode: RandomOpMode, backward: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
        """Run the model under `mode`.

        Returns:
            logits, and gradients at the output of the input embeddings (zeros without `backward`), float32 (samples, ...) each.
        """
        embedded: list[torch.Tensor] = []

        def require_grad(layer: Any, args: tuple, output: torch.Tensor) -> torch.Tensor:
            embedded.append(output if output.requires_grad else output.detach().requires_grad_())
            return embedded[-1].clone()  # some models scale it in place, which a leaf does not allow

        hook = self.model.get_input_embeddings().register_forward_hook(require_grad)
        autocast = torch.autocast(ids.device.type, torch.bfloat16, enabled=self.bf16)
        gradient = None
        try:
            with mode, torch.enable_grad(), autocast:
                logits = self.model(input_ids=ids).logits.float()
                if backward:
                    (gradient,) = torch.autograd.grad(logits.square().sum(), embedded[:1], allow_unused=True)
        finally:
            hook.remove()
        return logits.detach(), torch.zeros_like(logits) if gradient is None else gradient.float()


def check_random_ops(call: RandomOpModelCall, ids: torch.Tensor, max_len: int, tolerance: float) -> None:
    """Raise UserError if a random operation is not independent between samples.

    Args:
        call: the model in any mode. Its parameters, buffers and modes and all global generators are restored.
        ids: token ids, int64 (BATCH_SIZE, tokens).
        max_len: tokens of the longest sample of the run.
        tolerance: relative difference of logits that rounding may cause.
    """
    check_no_model_generators(call.model)
    with training_mode(call.model):
        copies = ids[:1, torch.arange(max_len, device=ids.device) % ids.shape[1]]  # (1, max_len)
        long = [record_random_ops(call, copies.expand(num_samples, -1), backward=False) for num_samples in (FEW, MORE)]
        few, more = (record_random_ops(call, ids[:1].expand(num_samples, -1)) for num_samples in (FEW, MORE))
        dims = find_random_op_sample_dims(few, more)
        if None in find_random_op_sample_dims(*long) + dims:
            check_shared_random_ops(call, ids, few, dims, tolerance)
        if few:
            check_random_op_independence(call, ids, few, dims, tolerance)


def check_no_model_generators(model: Any) -> None:
    """Raise UserError if a module holds a random generator: its numbers are not secret."""
    for name, module in model.named_modules():
        if any(isinstance(value, GENERATORS) for value in vars(module).values()):
            raise UserError(
                f"--model_name: {name or 'the model'} holds a random generator, which is not secret. Remove it from the model's "
                "code, or choose another --model_name"
            )


def check_shared_random_ops(
    call: RandomOpModelCall, ids: torch.Tensor, few: list[RandomOp], dims: list[Optional[int]], tolerance: float
) -> None:
    """Raise UserError if an outcome that all samples share changes logits or gradients."""
    shared = [op for op, dim in zip(few, dims) if dim is None]
    if not shared or not all(any(word in op.name for word in FILLABLE) for op in shared):
        raise random_op_error((shared or few)[0] if few else None, SHARED_OPS)
    low, high = (call(ids[:FEW], RandomOpMode(dims, shared_outcome=outcome)) for outcome in (0, 1))
    if not all(is_close(*pair, tolerance) for pair in zip(low, high)):
        raise random_op_error(shared[0], SHARED_OPS)


def check_random_op_independence(
    call: RandomOpModelCall, ids: torch.Tensor, few: list[RandomOp], dims: list[Optional[int]], tolerance: float
) -> None:
    """Raise UserError if other samples' random numbers or tokens change FIXED_SAMPLES' logits or gradients."""
    fixed, outputs = list(FIXED_SAMPLES), []
    for seed in range(1, ROUNDS + 1):
        changed = ids.roll(seed, 0)
        changed[fixed] = ids[fixed]
        mode = RandomOpMode(dims, other_seed=seed)
        outputs.append([values[fixed] for values in call(changed, mode)])
        check_same_random_ops(few, mode.ops)
    if not all(is_close(*pair, tolerance) for output in outputs[1:] for pair in zip(outputs[0], output)):
        raise random_op_error(few[0], "lets random numbers or texts of other samples change a sample's logits")


def record_random_ops(call: RandomOpModelCall, ids: torch.Tensor, backward: bool = True) -> list[RandomOp]:
    """Return the random operations of a call; refuse all generators but torch's global ones."""
    before, mode = python_and_numpy_random_states(), RandomOpMode()
    call(ids, mode, backward)
    if python_and_numpy_random_states() != before:
        raise random_op_error(None, "uses Python's random or NumPy, for all samples at once, as LayerDrop does")
    if op := next((op for op in mode.ops if op.has_generator), None):
        raise random_op_error(op, "uses a random generator of its own, which is not secret")
    if op := next((op for op in mode.ops if op.is_seeded), None):
        raise random_op_error(op, "seeds torch's random generators, so that its random numbers are not secret")
    return mode.ops


def python_and_numpy_random_states() -> tuple[Any, bytes]:
    """Return the states of the global generators of Python and NumPy, to be compared."""
    return random.getstate(), pickle.dumps(np.random.get_state(legacy=False))


def check_same_random_ops(few: list[RandomOp], other: list[RandomOp]) -> None:
    """Raise UserError if the operations of two calls differ in more than sizes."""
    for one, two in zip(few, other):
        if one.name != two.name or one.scalars != two.scalars or len(one.shape) != len(two.shape):
            problem = "generates other random numbers for other samples, as a permutation or choice across samples does"
            raise random_op_error(one, problem)
    if len(few) != len(other):
        raise random_op_error((few or other)[-1], "uses random numbers more or less often by chance, as LayerDrop does")


def find_random_op_sample_dims(few: list[RandomOp], more: list[RandomOp]) -> list[Optional[int]]:
    """Return for each operation the dimension that grows with the samples; None if they share its outcome."""
    check_same_random_ops(few, more)
    dims: list[Optional[int]] = []
    for one, two in zip(few, more):
        changed = [dim for dim, sizes in enumerate(zip(one.shape, two.shape)) if sizes[0] != sizes[1]]
        if len(changed) > 1 or (changed and one.shape[changed[0]] * MORE != two.shape[changed[0]] * FEW):
            raise random_op_error(one, WRONG_PROPORTION)
        dims.append(changed[0] if changed else None)
    return dims


def is_close(one: torch.Tensor, other: torch.Tensor, tolerance: float) -> bool:
    """Return whether two tensors are equal to a relative tolerance in L2 norm."""
    return bool((one - other).norm() <= tolerance * one.norm())


def random_op_error(op: Optional[RandomOp], problem: str) -> UserError:
    """Return the error for a model with this problem, caused by `op` if known."""
    name = "" if op is None else f" ({op.name})"
    return UserError(f"--model_name: in training this model {problem}{name}. {REMEDY}")
