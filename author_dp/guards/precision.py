"""Check that float32 matrix products are exact, as TF32 and bfloat16 would make norms too small; and that none mixes its rows.

Guarantees: training starts only if three conditions hold. Products of factors that use all bits of float32 come out exact, in the
model's shapes and on its devices; no setting allows torch to round others; and where the run computes in bfloat16, a row of nan
does not reach other rows of a product. A run that finds rounding later ends with `MechanismError`.

An author's norm and clipped gradient come from different products of the same numbers. TF32 rounds the factors by up to 2^-11, so
that an author may exceed the clip norm; where tokens cancel, by any factor. Many settings lead there (options, environment
variables, flags that libraries set), and a list of names cannot be complete. So the check computes products whose exact value is
known, and also refuses every known setting that permits rounding.

oneDNN's bfloat16 products on processors with AMX read beyond a row, and multiply by zero what they find, which is nan if that is.
So an author whose values are not finite would make those of others nan, and they would drop out of the sum. Whether that happens
depends on all three sizes of a product, so a processor is refused on which it does in any of some sizes.

Convolutions are not checked: the gradient of their parameters is materialized, so norm and sum are of the same numbers.

Example:

    >>> check_float32(model, bf16=False)
"""

import itertools
import os
from typing import Any, Optional

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from author_dp.clipping.norms import matmul
from author_dp.errors import MechanismError, UserError
from author_dp.models.modes import temporarily_set
from author_dp.models.quantization import computes_in_float32, quantized_layers

NUM_TOKENS = 64  # of the products in the model's shapes
MAX_SIDE = 1024  # rows and columns of these products: larger ones use the same kernels, and would take memory and time
MIXING_SIZES = (28, 200), (53, 264), (32, 256)  # rows, inner, columns: with AMX, all of them mix rows
SQUARE_SHAPE = (256, 256, 256)  # a shape that uses tensor cores wherever they are allowed
# Significant bits of the factors: bfloat16's; one more than TF32's; nearly all of float32's.
BF16_BITS, TF32_BITS, FLOAT32_BITS = 8, 12, 23

Shape = tuple[int, int, int]  # rows, inner, columns


def check_float32(model: nn.Module, bf16: bool) -> None:
    """Raise UserError if float32 products are rounded, or may be, or if bfloat16 products of the run mix rows.

    Args:
        model: its devices and weight shapes are checked.
        bf16: whether to check, too, that products of bfloat16 factors are summed in float32.
    """
    shapes = {SQUARE_SHAPE, *shapes_of(model)}
    for device in {parameter.device for parameter in model.parameters()}:
        rounded, settings = find_rounding(device, shapes, bf16), rounding_settings(device.type)
        if rounded or settings:
            raise rounding_error(settings, rounded)
        if computes_in_bfloat16(model, bf16):
            check_rows_are_separate(device, "--bf16" if bf16 else "--model_name")


def rounding_error(settings: list[str], rounded: Optional[str] = None) -> UserError:
    """Return the error for settings that allow rounding, or for a product that is rounded."""
    return UserError(
        f"{', '.join(settings) or 'a setting of torch, its libraries or the environment'}: "
        f"{rounded or 'float32 matrix products may be rounded'}, so an author may exceed the clip norm. Unset it; "
        "for 16-bit speed use --bf16"
    )


class PrecisionMonitor:
    """Check the precision while training: torch's settings at each step, and a product at log lines."""

    def __init__(self, device: torch.device):
        self.device = device
        self._settings: set[str] = set()
        self._factors = {bits: exact_factors(*SQUARE_SHAPE, bits, device) for bits in (TF32_BITS, FLOAT32_BITS)}

    def record_settings(self) -> None:
        """Record the settings in force at a step."""
        self._settings.update(rounding_settings(self.device.type))

    def test(self) -> None:
        """Raise MechanismError if float32 products are rounded, or may have been."""
        self.record_settings()
        problems = sorted(self._settings)
        rounded = [(matmul(left, right) != product).any() for left, right, product in self._factors.values()]
        if torch.stack(rounded).any():
            problems.append("float32 matrix products are rounded")
        if problems:
            raise MechanismError(f"{', '.join(problems)}: authors may have exceeded the clip norm since the last log line")


def shapes_of(model: nn.Module) -> set[Shape]:
    """Return the shapes of the products behind norms and clipped sums of the model's matrices."""
    shapes = set()
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dim() == 2:
            rows, columns = (min(size, MAX_SIDE) for size in parameter.shape)
            shapes |= {(rows, NUM_TOKENS, columns), (NUM_TOKENS, rows, NUM_TOKENS), (NUM_TOKENS, columns, NUM_TOKENS)}
    return shapes


def exact_factors(
    rows: int, inner: int, columns: int, bits: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return two float32 matrices and their product, which is exact in any order of summation.

    Half of the left factor, and the other half of the right one, holds odd integers of `bits` bits. They are multiplied by -1, 0
    and 1. So few of these are nonzero that no partial sum exceeds 2^24.

    Returns:
        left (rows, inner), right (inner, columns), product (rows, columns).
    """
    generator = torch.Generator().manual_seed(bits)

    def signs(size: int) -> torch.Tensor:
        return torch.randint(2, (size,), generator=generator).float() * 2 - 1

    def integers(*shape: int) -> torch.Tensor:
        magnitudes = torch.randint(2 ** (bits - 2), 2 ** (bits - 1), shape, generator=generator) * 2 + 1
        return magnitudes.float() * signs(magnitudes.numel()).view(shape)

    def sparse_signs(size: int) -> torch.Tensor:
        return signs(size) * (torch.randperm(size, generator=generator) < 2 ** (FLOAT32_BITS - bits))

    half = inner // 2
    wide_left, wide_right = integers(rows, inner - half), integers(half, columns)
    sparse_right, sparse_left = sparse_signs(inner - half), sparse_signs(half)  # what the wide halves are multiplied by
    row_signs, column_signs = signs(rows), signs(columns)
    left = torch.cat([wide_left, row_signs[:, None] * sparse_left], 1)
    right = torch.cat([sparse_right[:, None] * column_signs, wide_right])
    # Sums of elementwise products, not matrix products: no setting rounds these.
    left_sum, right_sum = (wide_left * sparse_right).sum(1), (sparse_left[:, None] * wide_right).sum(0)
    product = left_sum[:, None] * column_signs + row_signs[:, None] * right_sum
    return left.to(device), right.to(device), product.to(device)


def find_rounding(device: torch.device, shapes: set[Shape], bf16: bool = False) -> Optional[str]:
    """Return a description of the first product that is not exact; None if all are exact.

    Args:
        bf16: whether to check products of bfloat16 factors, too.
    """
    for rows, inner, columns in sorted(shapes):
        size = f"({rows} x {inner} times {inner} x {columns}) on {device}"
        for bits in (TF32_BITS, FLOAT32_BITS, *([BF16_BITS] if bf16 else [])):
            left, right, product = exact_factors(rows, inner, columns, bits, device)
            if bits == BF16_BITS:
                if not torch.equal(matmul(left.bfloat16(), right.bfloat16()), product):
                    return f"a matrix product of bfloat16 factors {size} is not summed in float32"
                continue
            # As the engines call it: plain, with a transposed factor, in batches, and added in place.
            results = [matmul(left, right), matmul(left.T.contiguous().T, right), *matmul(left.expand(2, -1, -1), right)]
            results.append(torch.zeros_like(product).addmm_(left, right))
            if not all(torch.equal(result, product) for result in results):
                return f"a float32 matrix product {size} is rounded"
    return None


def computes_in_bfloat16(model: nn.Module, bf16: bool) -> bool:
    """Return whether the run multiplies in bfloat16: under autocast, or in a frozen base of fewer bits."""
    is_quantized_so = any(layer.compute_dtype not in (None, torch.float32) for layer in quantized_layers(model))
    return bf16 or is_quantized_so or not computes_in_float32(model)


class BFloat16Watch(TorchDispatchMode):
    """Notice products in bfloat16, as of a model that casts in its own code.

    Attributes:
        found: whether there was one.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found |= "mm" in func.__name__ and any(getattr(arg, "dtype", None) == torch.bfloat16 for arg in args)
        return func(*args, **(kwargs or {}))


def check_rows_are_separate(device: torch.device, option: str) -> None:
    """Raise UserError, which names the option, if bfloat16 products mix rows."""
    if mixed := find_mixed_rows(device):
        raise UserError(
            f"{option}: in bfloat16, {mixed} lets an author whose values are not finite reach others. Set "
            "ONEDNN_MAX_CPU_ISA=AVX512_CORE_FP16 in the environment, or compute in float32"
        )


def find_mixed_rows(device: torch.device) -> Optional[str]:
    """Return a description of a bfloat16 product in which rows of nan reach other rows; None if there is none."""
    for rows, inner, columns in itertools.product(*MIXING_SIZES):
        left = torch.ones(rows, inner, dtype=torch.bfloat16, device=device)
        left[1::2] = torch.nan
        right = torch.ones(inner, columns, dtype=torch.bfloat16, device=device)
        for factor in (right, right.T.contiguous().T):
            with temporarily_set((torch.backends.mkldnn, "enabled", True)):  # it may be again later
                product = torch.mm(left, factor)
            if not torch.equal(product[::2], torch.full_like(left[::2, :1], inner).expand(-1, columns)):
                return f"a matrix product ({rows} x {inner} times {inner} x {columns}) on {device}"
    return None


# --- settings that allow rounding --------------------------------------------------------------------------


def rounding_settings(device: str) -> list[str]:
    """Return the settings that allow torch to round float32 products on a device type."""
    settings = []
    if torch.get_default_dtype() != torch.float32:
        settings.append(f"torch.set_default_dtype({torch.get_default_dtype()})")
    name, flags = ("cuda", torch.backends.cuda) if device == "cuda" else ("mkldnn", torch.backends.mkldnn)
    if (value := flags.matmul.fp32_precision) not in ("none", "ieee"):
        settings.append(
            f"torch.backends.{name}.matmul.fp32_precision {value} (also set by --tf32, allow_tf32, "
            "torch.backends.fp32_precision and torch.set_float32_matmul_precision)"
        )
    if device == "cuda" and os.environ.get("NVIDIA_TF32_OVERRIDE", "0") != "0":
        settings.append(f"NVIDIA_TF32_OVERRIDE={os.environ['NVIDIA_TF32_OVERRIDE']}")
    for variable in ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE") if device == "cpu" else ():
        if os.environ.get(variable, "strict").lower() != "strict":
            settings.append(f"{variable}={os.environ[variable]}")
    return settings


def precision_tolerance_factor(model: nn.Module) -> float:
    """Return how much coarser than float32 the model computes: a frozen base may do so in bfloat16."""
    return 1.0 if computes_in_float32(model) else 100.0
