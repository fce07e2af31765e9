"""A simulated GPU: tensors say "cuda", and compute on the CPU or, as meta tensors, not at all.

It is a second device on torch's Python backend for PrivateUse1, so autograd, dispatch and views are those of a real one. An
operation on tensors of both devices raises. Every operation, every copy between the devices and every wait of the host is noted,
with the function of the project that caused it.

With `compute=False`, tensors have shapes only, so a model of any size fits. `answer` then gives the values that the host reads.

Not simulated: time, kernels and their rounding, the order of atomic additions, streams, fragmentation, several GPUs. Where a
kernel of a real GPU rounds otherwise than the CPU's, only a real GPU tells.

Import this module before anything runs a backward pass, in a process of its own: the backend is registered for good.

Example:

    >>> with simulated_gpu() as gpu:
    ...     torch.ones(2, device="cuda").sum().item()
    >>> gpu.waits
    Counter({('', '_local_scalar_dense', 'test.py:test'): 1})
"""

import sys
import weakref
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

ROOT = str(Path(__file__).parents[2]) + "/"
aten = torch.ops.aten
CPU, META, CUDA = torch.device("cpu"), torch.device("meta"), torch.device("cuda", 0)
BACKEND = "gpu:0"  # the name of the device for torch's C++ side
# Operations after which the host knows a value or a shape that the device computed.
WAITS = {"_local_scalar_dense", "nonzero", "bincount", "masked_select", "_unique2", "equal", "is_nonzero", "unique_consecutive"}
COPIES = ("copy", "_to_copy", "_copy_from")
# Operations without a kernel: views, and memory that is not written.
NO_KERNEL = {
    "detach", "alias", "view", "_unsafe_view", "t", "transpose", "permute", "expand", "unsqueeze", "squeeze", "select", "slice",
    "split", "split_with_sizes", "diagonal", "as_strided", "_reshape_alias", "unbind", "lift_fresh", "empty", "empty_like",
    "new_empty", "empty_strided", "new_empty_strided", "view_as_real", "unfold", "is_same_size", "sym_size", "set_",
}  # fmt: skip
LIBRARIES = ("transformers/", "accelerate/", "peft/", "opacus/")


def map_nested(function: Callable[[Any], Any], value: Any) -> Any:
    """Apply a function to what tuples, lists and dictionaries hold. (torch's own takes most of a test's time.)"""
    if value is None or isinstance(value, torch.Tensor):
        return function(value)
    if isinstance(value, tuple | list):
        items = [map_nested(function, item) for item in value]
        return items if isinstance(value, list) else tuple(items)
    if isinstance(value, dict):
        return {key: map_nested(function, item) for key, item in value.items()}
    return function(value)


def tensors_of(value: Any) -> list[torch.Tensor]:
    """Return the tensors in nested arguments."""
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, tuple | list):
        return [tensor for item in value for tensor in tensors_of(item)]
    return [tensor for item in value.values() for tensor in tensors_of(item)] if isinstance(value, dict) else []


class Operand(NamedTuple):
    """A tensor of an operation, as it is read or written."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    num_bytes: int  # an expanded dimension counts once


class Operation(NamedTuple):
    """One operation on the device."""

    name: str
    inputs: list[Operand]
    outputs: list[Operand]
    where: str  # file and function that caused it


def operand(tensor: torch.Tensor) -> Operand:
    """Return shape, dtype and bytes of a tensor."""
    numel = 1
    for size, stride in zip(tensor.shape, tensor.stride()):
        numel *= size if stride or size == 0 else 1
    return Operand(tuple(tensor.shape), tensor.dtype, numel * tensor.element_size())


class MemoryMeter:
    """Count the bytes of all storages that a tensor still uses."""

    def __init__(self) -> None:
        self._users: Counter = Counter()
        self.now = self.peak = 0

    def hold(self, owner: Any, tensor: torch.Tensor) -> None:
        """Count the storage of `tensor` until `owner` is freed."""
        storage = tensor.untyped_storage()
        key, num_bytes = storage._cdata, storage.nbytes()
        if not self._users[key]:
            self.now += num_bytes
            self.peak = max(self.peak, self.now)
        self._users[key] += 1
        weakref.finalize(owner, self._release, key, num_bytes)

    def _release(self, key: int, num_bytes: int) -> None:
        self._users[key] -= 1
        if not self._users[key]:
            self.now -= num_bytes


class GpuTensor(torch.Tensor):
    """A tensor on the simulated device; `inner` holds its values on the CPU, or its shape."""

    current: "SimulatedGpu | None" = None

    @staticmethod
    def __new__(cls, inner: torch.Tensor, requires_grad: bool = False) -> "GpuTensor":
        return torch.Tensor._make_wrapper_subclass(
            cls, inner.size(), strides=inner.stride(), storage_offset=inner.storage_offset(), dtype=inner.dtype,
            device=BACKEND, requires_grad=requires_grad,
        )  # fmt: skip

    def __init__(self, inner: torch.Tensor, requires_grad: bool = False):
        self.inner = inner
        if GpuTensor.current is not None and not GpuTensor.current.compute:  # of tiny models nobody asks
            GpuTensor.current.memory.hold(self, inner)

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)

    def __format__(self, spec: str) -> str:
        return format(self.item() if spec else repr(self), spec)

    def __repr__(self) -> str:
        return f"GpuTensor({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on a GPU tensor outside of `with simulated_gpu()`")


class SimulatedGpu(TorchDispatchMode):
    """The device: compute its operations, and note them.

    Args:
        compute: on the CPU; otherwise tensors have shapes only.
        answer: what the host reads where nothing is computed: (operation, where, arguments) to a number.
        has_out_dtype: whether a product of bfloat16 matrices can have a float32 result; False as on ROCm.
    Attributes:
        waits: how often the host waited, {(phase, operation, where): times}.
        copies: between the devices, {(phase, direction, where): times}.
        float64: where a float64 tensor was made on the device, which Macs (MPS) cannot.
        operations: those with a kernel, in order.
        phase: of the run, set by the test.
        recording: whether operations are noted.
    """

    def __init__(self, compute: bool = True, answer: Callable[[str, str, tuple], Any] = lambda *_: 1, has_out_dtype: bool = True):
        super().__init__()
        self.compute, self.answer, self.has_out_dtype = compute, answer, has_out_dtype
        self.waits: Counter = Counter()
        self.copies: Counter = Counter()
        self.float64: set[str] = set()
        self.operations: list[Operation] = []
        self.phase, self.memory, self.recording = "", MemoryMeter(), True
        self.casts: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # autocast's cache: {id: (weight, its cast)}
        self.generator = torch.Generator()  # the device's default one

    def reset(self) -> None:
        """Forget what was noted; memory in use stays."""
        self.waits.clear(), self.copies.clear(), self.operations.clear(), self.float64.clear()
        self.memory.peak = self.memory.now

    def where(self) -> str:
        """Return file and function of the innermost frame of the project, or else of a library."""
        frame, library = sys._getframe(2), "?"
        while frame is not None:
            name, function = frame.f_code.co_filename, frame.f_code.co_name
            if name.startswith(ROOT) and "site-packages" not in name and ("/gpu/" not in name or "/gpu/test_" in name):
                return f"{name[len(ROOT) :]}:{function}"
            if library == "?" and any(part in name for part in LIBRARIES):
                library = f"{name.split('site-packages/')[-1]}:{function}"
            frame = frame.f_back
        return library

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = func._schema.name.split("::")[1]
        name = name if name.endswith("__") else name.rstrip("_")
        tensors = tensors_of((args, kwargs))
        on_cpu = [t for t in tensors if not isinstance(t, GpuTensor)]
        device = kwargs.get("device")
        target = None if device is None else torch.device(device).type
        if len(on_cpu) == len(tensors) and target not in ("gpu", "cuda"):
            return func(*args, **kwargs)
        if name == "to":  # as it arrives from below autograd
            with self:
                return func.decompose(*args, **kwargs)
        where = self.where()
        if name in COPIES:
            self._note_copy(name, args, kwargs, target, where)
        elif any(t.dim() for t in on_cpu):
            raise RuntimeError(f"{func} at {where}: tensors of both devices: {[tuple(t.shape) for t in on_cpu]} on the CPU")
        is_mask = name in ("index", "index_put") and any(i is not None and i.dtype == torch.bool for i in args[1])
        if name in WAITS or is_mask:
            self.waits[self.phase, name, where] += 1
        out = self._compute(func, name, args, kwargs, target, where)
        outputs = tensors_of(out)
        if any(isinstance(t, GpuTensor) and t.dtype == torch.float64 for t in outputs):
            self.float64.add(where)
        if self.recording and name not in NO_KERNEL:
            read = tensors_of((args, {key: value for key, value in kwargs.items() if key != "out"}))
            self.operations.append(Operation(name, [operand(t) for t in read], [operand(t) for t in outputs], where))
        return out

    def _note_copy(self, name: str, args: tuple, kwargs: dict, target: Any, where: str) -> None:
        to_gpu = isinstance(args[0], GpuTensor) if name == "copy" else target in (None, "gpu", "cuda")
        source = args[1] if name == "copy" else args[0]
        if isinstance(source, GpuTensor) == to_gpu:
            return
        direction = "to the GPU" if to_gpu else "to the CPU"
        non_blocking = kwargs.get("non_blocking") or (name == "copy" and len(args) > 2 and args[2])
        self.copies[self.phase, direction, where] += 1
        # A non-blocking copy to pageable memory of the host would read it too early: it needs a wait of its own.
        if source.numel() and not (to_gpu and non_blocking and getattr(source, "pinned", False)):
            self.waits[self.phase, f"copy {direction}", where] += 1

    def note_list(self, to_gpu: bool) -> None:
        """Note a copy that torch makes below all modes, of a list as an index."""
        self.waits[self.phase, f"copy to the {'GPU' if to_gpu else 'CPU'} (list)", self.where()] += 1

    def _compute(self, func: Any, name: str, args: tuple, kwargs: dict, target: Any, where: str) -> Any:
        """Run an operation on the inner tensors."""
        if target is not None:
            kwargs["device"] = CPU if self.compute or target == "cpu" else META
        kwargs.pop("pin_memory", None)
        if name in ("mm", "bmm") and func._overloadname == "dtype":
            if not self.has_out_dtype:
                raise RuntimeError(f"{name} with out_dtype is only supported on CUDA")
            left, right, dtype = args
            return GpuTensor(torch.matmul(left.inner.to(dtype), right.inner.to(dtype)))
        if not self.compute:
            done, result = self._shapes_only(func, name, args, kwargs, target, where)
            if done:
                return result

        def to_inner(value: Any) -> Any:
            if isinstance(value, GpuTensor):
                return value.inner
            is_array = isinstance(value, torch.Tensor) and (value.dim() or name in COPIES)
            return value.to(META) if is_array and not self.compute else value

        inner_args, inner_kwargs = map_nested(to_inner, (args, kwargs))
        with _disable_current_modes():
            if torch.Tag.nondeterministic_seeded in func.tags and kwargs.get("generator") is None and self.compute:
                out = self._with_device_generator(func, inner_args, inner_kwargs)
            else:
                out = func(*inner_args, **inner_kwargs)
        return out if name == "_to_copy" and target == "cpu" else self._wrap(func, args, kwargs, out)

    def _with_device_generator(self, func: Any, args: tuple, kwargs: dict) -> Any:
        """Take random numbers from the device's default generator, not the CPU's."""
        before = torch.default_generator.get_state()
        torch.default_generator.set_state(self.generator.get_state())
        try:
            return func(*args, **kwargs)
        finally:
            self.generator.set_state(torch.default_generator.get_state())
            torch.default_generator.set_state(before)

    def _shapes_only(self, func: Any, name: str, args: tuple, kwargs: dict, target: Any, where: str) -> tuple[bool, Any]:
        """Return (True, result) for an operation that meta tensors cannot run."""
        if name.startswith(("_fused_", "_foreach_")) and func._schema.name.endswith("_"):
            return True, None
        if name == "_local_scalar_dense":
            return True, self.answer(name, where, args)
        if name == "equal":
            return True, True
        if name == "bincount":
            return True, GpuTensor(torch.empty(max(args[2] if len(args) > 2 else 1, 1), dtype=torch.int64, device=META))
        if name == "nonzero":
            rows = self.answer(name, where, args)
            return True, GpuTensor(torch.empty(rows, args[0].dim(), dtype=torch.int64, device=META))
        if name in ("copy", "_to_copy") and target == "cpu":
            return True, torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if name == "copy" and not isinstance(args[0], GpuTensor):
            return True, args[0].zero_()
        return False, None

    def _wrap(self, func: Any, args: tuple, kwargs: dict, out: Any) -> Any:
        """Wrap new tensors; return the argument itself where it was changed in place."""
        known = {id(t.inner): t for t in tensors_of((args, kwargs)) if isinstance(t, GpuTensor)}
        if func._schema.name.endswith("copy_") and not isinstance(args[0], GpuTensor):
            return args[0]

        def wrap(value: Any) -> Any:
            if not isinstance(value, torch.Tensor):
                return value
            return known[id(value)] if id(value) in known else GpuTensor(value)

        return map_nested(wrap, out)


class simulated_gpu(ExitStack):  # noqa: N801  # reads as a function
    """Context in which everything that asks for a GPU finds a simulated one; takes the arguments of SimulatedGpu."""

    def __init__(self, **options: Any):
        super().__init__()
        self.gpu = SimulatedGpu(**options)

    def __enter__(self) -> SimulatedGpu:  # type: ignore[override]
        from simulated_torch import replace_cuda  # it needs GpuTensor

        super().__enter__()
        GpuTensor.current = self.gpu
        replace_cuda(self, self.gpu)
        self.enter_context(self.gpu)
        return self.gpu
