"""Check that float32 matrix products are float32 products: TF32 and bfloat16 would make norms too small.

Guarantees: training starts only if products of factors that fill float32, in the model's own shapes and on its devices, come out
exact, and no setting allows torch to round others. A run that finds otherwise later ends with `MechanismError`.

Why: an author's norm and clipped gradient come from different products of the same numbers. Rounding the factors to TF32 changes
each by 2^-11, so that an author may exceed the clip norm; where tokens cancel, by any factor. Many doors lead there (options,
environment variables, libraries that set a flag), and a name that is missing in a list shows nothing. So the check computes
products whose exact value is known, and also refuses every known setting that permits rounding.

Convolutions are not checked: a parameter that they use has its gradient formed, norm and sum are of the same numbers.

Example:

    >>> check_float32(model, bf16=False)
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn, Optional

import torch
from torch import nn

from author_dp.clipping.grad_factors import matmul
from author_dp.errors import MechanismError, UserError

TOKENS = 64  # of the products in the model's shapes
MAX_SIDE = 1024  # rows and columns of these products: larger ones use the same kernels, and would take memory and time
SQUARE_SHAPE = (256, 256, 256)  # for which tensor cores are used wherever they are allowed
HALF_BITS, TF32_BITS, FLOAT32_BITS = 8, 12, 23  # significant bits of the factors: bfloat16's, one more than TF32's, nearly all

Shape = tuple[int, int, int]  # rows, inner, columns


def check_float32(model: nn.Module, bf16: bool) -> None:
    """Raise UserError if float32 products are rounded, or may be.

    Args:
        model: its devices and the shapes of its weights are used.
        bf16: whether products of bfloat16 factors must be summed in float32, too.
    """
    shapes = {SQUARE_SHAPE, *shapes_of(model)}
    for device in {parameter.device for parameter in model.parameters()}:
        found, names = find_rounding(device, shapes, bf16), rounding_settings(device.type)
        if found or names:
            raise_rounded(names, found)


def raise_rounded(names: list[str], found: Optional[str] = None) -> NoReturn:
    """Raise UserError for settings that allow rounding, or for a product that is rounded."""
    raise UserError(
        f"{', '.join(names) or 'a setting of torch, its libraries or the environment'}: "
        f"{found or 'float32 matrix products may be rounded'}, so an author may exceed the clip norm. Unset it; "
        "for 16-bit speed use --bf16"
    )


class PrecisionMonitor:
    """Check the precision while training: torch's settings in each step, and a product when asked.

    Args:
        device: of the run.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._seen: set[str] = set()
        self._factors = {bits: exact_factors(*SQUARE_SHAPE, bits, device) for bits in (TF32_BITS, FLOAT32_BITS)}

    def look(self) -> None:
        """Note the settings that are in force in a step."""
        self._seen.update(rounding_settings(self.device.type))

    def test(self) -> None:
        """Raise MechanismError if float32 products are rounded, or may have been."""
        self.look()
        found = sorted(self._seen)
        if not all(torch.equal(matmul(left, right), product) for left, right, product in self._factors.values()):
            found.append("float32 matrix products are rounded")
        if found:
            raise MechanismError(f"{', '.join(found)}: clip norms computed since the last log line may have been exceeded")


def shapes_of(model: nn.Module) -> set[Shape]:
    """Return the shapes of products that norms and clipped sums of the model's matrices take."""
    shapes = set()
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dim() == 2:
            rows, columns = (min(size, MAX_SIDE) for size in parameter.shape)
            shapes |= {(rows, TOKENS, columns), (TOKENS, rows, TOKENS), (TOKENS, columns, TOKENS)}
    return shapes


def exact_factors(
    rows: int, inner: int, columns: int, bits: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return two float32 matrices and their product, which is exact in whatever order it is summed.

    Half of the left factor, and the other half of the right one, holds odd integers of `bits` bits; they are multiplied by -1, 0
    and 1, and by so few that are not 0 that no partial sum exceeds 2^24.

    Returns:
        left (rows, inner), right (inner, columns), product (rows, columns).
    """
    generator = torch.Generator().manual_seed(bits)

    def signs(count: int) -> torch.Tensor:
        return torch.randint(2, (count,), generator=generator).float() * 2 - 1

    def integers(*shape: int) -> torch.Tensor:
        size = torch.randint(2 ** (bits - 2), 2 ** (bits - 1), shape, generator=generator) * 2 + 1
        return size.float() * signs(size.numel()).view(shape)

    def sparse(count: int) -> torch.Tensor:
        return signs(count) * (torch.randperm(count, generator=generator) < 2 ** (FLOAT32_BITS - bits))

    half = inner // 2
    wide_left, wide_right = integers(rows, inner - half), integers(half, columns)
    meets_left, meets_right = sparse(inner - half), sparse(half)
    of_row, of_column = signs(rows), signs(columns)
    left = torch.cat([wide_left, of_row[:, None] * meets_right], 1)
    right = torch.cat([meets_left[:, None] * of_column, wide_right])
    # Sums, not products of matrices: no setting rounds these.
    product = (wide_left * meets_left).sum(1)[:, None] * of_column + of_row[:, None] * (meets_right[:, None] * wide_right).sum(0)
    return left.to(device), right.to(device), product.to(device)


def find_rounding(device: torch.device, shapes: set[Shape], bf16: bool = False) -> Optional[str]:
    """Return a description of the first product that is not exact, None if all are.

    Args:
        bf16: check products of bfloat16 factors, too.
    """
    for rows, inner, columns in sorted(shapes):
        size = f"({rows} x {inner} times {inner} x {columns}) on {device}"
        for bits in (TF32_BITS, FLOAT32_BITS, *([HALF_BITS] if bf16 else [])):
            left, right, product = exact_factors(rows, inner, columns, bits, device)
            if bits == HALF_BITS:
                if not torch.equal(matmul(left.bfloat16(), right.bfloat16()), product):
                    return f"a matrix product of bfloat16 factors {size} is not summed in float32"
                continue
            # As the engines call it: plain, of a transposed factor, in batches, added in place.
            found = [matmul(left, right), matmul(left.T.contiguous().T, right), *matmul(left.expand(2, -1, -1), right)]
            found.append(torch.zeros_like(product).addmm_(left, right))
            if not all(torch.equal(one, product) for one in found):
                return f"a float32 matrix product {size} is rounded"
    return None


# --- what allows rounding ---------------------------------------------------------------------------------


def rounding_settings(device: str) -> list[str]:
    """Return the settings that allow torch to round float32 products on a type of device."""
    found = []
    if torch.get_default_dtype() != torch.float32:
        found.append(f"torch.set_default_dtype({torch.get_default_dtype()})")
    name, flags = ("cuda", torch.backends.cuda) if device == "cuda" else ("mkldnn", torch.backends.mkldnn)
    if (value := flags.matmul.fp32_precision) not in ("none", "ieee"):
        found.append(
            f"torch.backends.{name}.matmul.fp32_precision {value} (also set by --tf32, allow_tf32, "
            "torch.backends.fp32_precision and torch.set_float32_matmul_precision)"
        )
    if device == "cuda" and os.environ.get("NVIDIA_TF32_OVERRIDE", "0") != "0":
        found.append(f"NVIDIA_TF32_OVERRIDE={os.environ['NVIDIA_TF32_OVERRIDE']}")
    for variable in ("ONEDNN_DEFAULT_FPMATH_MODE", "DNNL_DEFAULT_FPMATH_MODE") if device == "cpu" else ():
        if os.environ.get(variable, "strict").lower() != "strict":
            found.append(f"{variable}={os.environ[variable]}")
    return found


@contextmanager
def float32_products() -> Iterator[None]:
    """Switch off TF32 and bfloat16 for float32 products and convolutions, whichever way they were switched on."""
    backends: Any = torch.backends
    flags = [backends.cuda.matmul, backends.mkldnn.matmul, backends.cudnn.conv]
    before = [flag.fp32_precision for flag in flags]
    try:
        for flag in flags:
            flag.fp32_precision = "ieee"
        yield
    finally:
        for flag, value in zip(flags, before):
            flag.fp32_precision = value


@contextmanager
def full_precision_sums() -> Iterator[None]:
    """Make CUDA sum products of 16-bit factors in float32 throughout; by default it may add parts of a sum in 16 bits."""
    flags = torch.backends.cuda.matmul
    before = flags.allow_bf16_reduced_precision_reduction, flags.allow_fp16_reduced_precision_reduction
    try:
        flags.allow_bf16_reduced_precision_reduction = flags.allow_fp16_reduced_precision_reduction = False
        yield
    finally:
        flags.allow_bf16_reduced_precision_reduction, flags.allow_fp16_reduced_precision_reduction = before
