"""What torch's own functions do on the simulated GPU: the backend, torch.cuda, autocast, attention, moving modules."""

import itertools
from contextlib import ExitStack, nullcontext
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from simulated_gpu import BACKEND, CPU, CUDA, META, GpuTensor, SimulatedGpu
from torch.overrides import TorchFunctionMode
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

from author_dp.guards.random_ops import RandomOpMode

aten, T = torch.ops.aten, torch.Tensor
FREE_AND_TOTAL = (100 << 30, 141 << 30)  # bytes
# What autocast computes in the lower dtype, and in float32, of what is used here.
LOWER = {F.linear, torch.matmul, T.matmul, T.__matmul__, torch.mm, torch.addmm, torch.bmm, torch.baddbmm}
WIDER = {
    F.layer_norm, torch.layer_norm, torch.softmax, F.softmax, T.softmax, torch.log_softmax, F.log_softmax, T.log_softmax,
    torch.norm, T.norm, torch.sum, T.sum, torch.exp, T.exp, torch.log, T.log, torch.rsqrt, T.rsqrt, torch.cumsum, T.cumsum,
    torch.pow, T.pow, T.__pow__, torch.prod, F.cross_entropy, F.nll_loss, torch.logsumexp, T.logsumexp, F.rms_norm,
}  # fmt: skip
_libraries: list[torch.library.Library] = []  # kept alive
_attention = F.scaled_dot_product_attention


class BackendModule(_DummyBackendModule):
    """torch.gpu, which torch asks for instead of torch.cuda in C++."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return current().generator.get_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        current().generator.set_state(state)


def current() -> SimulatedGpu:
    """Return the device of the innermost context."""
    assert GpuTensor.current is not None
    return GpuTensor.current


class DeviceNames(TorchFunctionMode):
    """Understand "cuda" wherever torch is asked for a device, and cast as autocast does."""

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is T.tolist and isinstance(args[0], GpuTensor):
            return args[0].cpu().tolist()
        if func in (T.untyped_storage, T.data_ptr, T.__reduce_ex__) and isinstance(args[0], GpuTensor):
            return func(args[0].detach().inner, *args[1:])  # to be saved
        if func in (torch.device, T.device.__get__, T.is_cuda.__get__):
            return func(*args, **kwargs)
        args = tuple([to_backend_name(value) for value in args])
        kwargs = {name: to_backend_name(value) for name, value in kwargs.items()}
        if torch.is_autocast_enabled("gpu") and (func in LOWER or func in WIDER):
            dtype = torch.get_autocast_dtype("gpu") if func in LOWER else torch.float32
            args = tuple([autocast(value, dtype) for value in args])
            kwargs = {name: autocast(value, dtype) for name, value in kwargs.items()}
        if kwargs.pop("pin_memory", False):
            return pin_memory(func(*args, **kwargs))
        if func in (torch.tensor, torch.as_tensor) and kwargs.get("device") == torch.device(BACKEND):  # made below all modes
            return func(*args, **{**kwargs, "device": "cpu"}).to(BACKEND)
        return func(*args, **kwargs)


def to_backend_name(value: Any) -> Any:
    """Replace "cuda" by the name that C++ knows; leave all other arguments."""
    is_name = isinstance(value, torch.device | str) and str(value).split(":")[0] == "cuda"
    return torch.device(BACKEND) if is_name else value


def autocast(tensor: Any, dtype: torch.dtype) -> Any:
    """Cast as autocast does, which remembers the casts of trained weights until its outermost context ends."""
    if not isinstance(tensor, GpuTensor) or not tensor.is_floating_point() or tensor.dtype in (dtype, torch.float64):
        return tensor
    casts, key = current().casts, id(tensor)
    if key in casts:
        return casts[key][1]
    cast = tensor.to(dtype)
    if tensor.is_leaf and tensor.requires_grad and tensor.dtype == torch.float32 and torch.is_autocast_cache_enabled():
        casts[key] = tensor, cast
    return cast


def attention(
    query: Any, key: Any, value: Any, attn_mask: Any = None, dropout_p: float = 0.0, is_causal: bool = False, scale: Any = None,
    enable_gqa: bool = False,
) -> torch.Tensor:  # fmt: skip
    """Flash attention, as on a GPU one operation forward and one backward; the CPU's has no dropout."""
    if not isinstance(query, GpuTensor) or (dropout_p and current().compute):
        return _attention(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa)
    if torch.is_autocast_enabled("gpu"):
        query, key, value = (autocast(t, torch.get_autocast_dtype("gpu")) for t in (query, key, value))
    if key.shape[1] != query.shape[1]:
        key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], 1) for t in (key, value))
    mask = None if attn_mask is None or attn_mask.dtype == torch.bool else attn_mask.to(query.dtype)
    if attn_mask is not None and mask is None:
        mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill(~attn_mask, -torch.inf)
    flash = aten._scaled_dot_product_flash_attention_for_cpu
    return flash(query, key, value, 0.0, is_causal, attn_mask=mask, scale=scale)[0]


def understand_names(handler: Any) -> Any:
    """Return a dispatch handler that may name devices itself: torch calls it below all function modes."""

    def with_names(*args: Any, **kwargs: Any) -> Any:
        with DeviceNames():
            return handler(*args, **kwargs)

    return with_names


class DeviceGenerator(torch.Generator):
    """A generator of the device; it computes on the CPU."""

    device = property(lambda self: self.on)

    def __new__(cls, device: Any = "cpu") -> "DeviceGenerator":
        generator = super().__new__(cls, "cpu")
        generator.on = CPU if torch.device(device).type == "cpu" else CUDA
        return generator


def make_empty(op: Any, *args: Any, device: Any = None, pin_memory: Any = None, **kwargs: Any) -> GpuTensor:
    return GpuTensor(op(*args, device=CPU if current().compute else META, **kwargs))


def copy_from(source: Any, target: Any, non_blocking: bool = False) -> Any:
    current().note_list(to_gpu=isinstance(target, GpuTensor))
    inner_target, inner_source = (t.inner if isinstance(t, GpuTensor) else t for t in (target, source))
    if inner_target.device.type != "meta":
        inner_target.copy_(inner_source)
    return target


def apply_to_module(model: torch.nn.Module, fn: Any, recurse: bool = True) -> torch.nn.Module:
    """nn.Module._apply where tensors become another class: tied weights stay tied, and attributes of parameters stay."""
    moved: dict[int, tuple[Any, Any]] = {}  # with the old tensor, so that its id is not used again
    with torch.no_grad():
        for module in model.modules():
            for old in itertools.chain(module._parameters.values(), module._buffers.values()):
                if old is None or id(old) in moved:
                    continue
                new = fn(old)
                if isinstance(new, GpuTensor) == isinstance(old, GpuTensor) and new.dtype == old.dtype:
                    new = old
                elif isinstance(old, torch.nn.Parameter):
                    new = torch.nn.Parameter(new, old.requires_grad)
                    new.__dict__.update({key: value for key, value in vars(old).items() if key != "inner"})
                moved[id(old)] = old, new
            for tensors in (module._parameters, module._buffers):
                tensors.update({name: moved[id(old)][1] for name, old in tensors.items() if old is not None})
    return model


def pin_memory(tensor: torch.Tensor, device: Any = None) -> torch.Tensor:
    copy = tensor.clone()
    copy.pinned = True  # type: ignore[attr-defined]
    return copy


def register_backend() -> None:
    """Register the device with torch, once a process."""
    if _libraries:
        return
    _setup_privateuseone_for_python_backend("gpu", backend_module=BackendModule())
    library, fallback = torch.library.Library("aten", "IMPL"), torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
    fallback.fallback(torch.library.fallthrough_kernel)
    # What torch asks for below all modes: a list as an index becomes a tensor on the device.
    for op in (aten.empty.memory_format, aten.empty_strided.default):
        name = op._schema.name.split("::")[1] + (f".{op._schema.overload_name}" if op._schema.overload_name else "")
        library.impl(name, lambda *args, op=op, **kwargs: make_empty(op, *args, **kwargs), "PrivateUse1")
    library.impl("_copy_from", copy_from, "PrivateUse1")
    _libraries.extend([library, fallback])


def cuda_functions(gpu: SimulatedGpu) -> dict[str, Any]:
    """Return what replaces the functions of torch.cuda."""
    return {
        "is_available": lambda: True, "device_count": lambda: 1, "current_device": lambda: 0, "set_device": lambda device: None,
        "mem_get_info": lambda device=None: FREE_AND_TOTAL, "get_rng_state": lambda device=None: gpu.generator.get_state(),
        "set_rng_state": lambda state, device=None: gpu.generator.set_state(state), "_lazy_init": lambda: None,
        "get_rng_state_all": lambda: [gpu.generator.get_state()], "is_initialized": lambda: True,
        "manual_seed_all": lambda seed: gpu.generator.manual_seed(seed),
        "manual_seed": lambda seed: gpu.generator.manual_seed(seed),
        "is_bf16_supported": lambda *args, **kwargs: True, "synchronize": lambda device=None: None, "empty_cache": lambda: None,
        "get_device_capability": lambda device=None: (9, 0), "get_device_name": lambda device=None: "simulated",
        "max_memory_allocated": lambda device=None: gpu.memory.peak, "memory_allocated": lambda device=None: gpu.memory.now,
        "memory_reserved": lambda device=None: gpu.memory.now,
        "reset_peak_memory_stats": lambda device=None: setattr(gpu.memory, "peak", gpu.memory.now),
        "is_current_stream_capturing": lambda: False, "_is_in_bad_fork": lambda: False, "_initialized": True,
        "device": lambda device: nullcontext(), "default_generators": (gpu.generator,),
    }  # fmt: skip


def replace_cuda(stack: ExitStack, gpu: SimulatedGpu) -> None:
    """Enter all replacements into `stack`."""
    gpu.generator = DeviceGenerator("cuda")
    functions = cuda_functions(gpu)
    replacements = [(torch.cuda, name, value) for name, value in functions.items()]
    replacements += [
        (torch.cuda.random, name, functions[name]) for name in functions if name.endswith(("rng_state", "state_all"))
    ]
    autocast_class = torch.amp.autocast_mode.autocast
    init, is_enabled, get_dtype = autocast_class.__init__, torch.is_autocast_enabled, torch.get_autocast_dtype
    clear = torch.clear_autocast_cache

    def name_of(device_type: str) -> str:
        return "gpu" if device_type == "cuda" else device_type

    def init_autocast(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        init(self, name_of(device_type), *args, **kwargs)

    def clear_cache() -> None:
        clear()
        gpu.casts.clear()

    replacements += [
        (autocast_class, "__init__", init_autocast),
        (torch, "clear_autocast_cache", clear_cache),
        (torch, "is_autocast_enabled", lambda device_type="gpu": is_enabled(name_of(device_type))),
        (torch, "get_autocast_dtype", lambda device_type="gpu": get_dtype(name_of(device_type))),
        (torch.Tensor, "pin_memory", pin_memory),
        (F, "scaled_dot_product_attention", attention),
        (torch, "Generator", DeviceGenerator),
        (torch.accelerator, "current_accelerator", lambda *args, **kwargs: torch.device("cuda")),
        (torch, "inference_mode", lambda mode=True: torch.no_grad()),  # its tensors cannot be wrapped
        (torch.nn.Module, "_apply", apply_to_module),
        (RandomOpMode, "__torch_dispatch__", understand_names(RandomOpMode.__torch_dispatch__)),
        (torch.autograd, "has_torch_function", lambda args: False),  # names of devices count within it, too
    ]
    for owner, name, value in replacements:
        stack.enter_context(mock.patch.object(owner, name, value))
    # Checkpointing stops a recomputation by an exception, which may not pass through rules written in Python.
    stack.enter_context(torch.utils.checkpoint.set_checkpoint_early_stop(False))
    stack.enter_context(torch.autograd.set_multithreading_enabled(False))  # modes belong to the thread
    stack.enter_context(DeviceNames())


register_backend()
