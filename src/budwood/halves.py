"""Half precision on CPUs: which of them have instructions for it, and how to do without."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor


def multiplies(dtype: torch.dtype, device: torch.device | str = "cpu") -> bool:
    """Whether a device has instructions for products of matrices of a dtype.

    PyTorch uses those for bfloat16 on CPUs with AVX-512, and few CPUs have any for float16. Without
    them a product takes eight to nine times as long as in float32. Other devices are taken to have
    both.

    Args:
        dtype: of the matrices.
        device: a torch device or its name.
    """
    if dtype not in (torch.bfloat16, torch.float16) or torch.device(device).type != "cpu":
        return True
    if not torch.backends.mkldnn.is_available():  # its operators are missing then
        return False
    if dtype == torch.bfloat16:
        return torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.ops.mkldnn._is_mkldnn_fp16_supported()


def fast_half(device: torch.device | str = "cpu") -> torch.dtype:
    """bfloat16 if a device has instructions for it, else float32."""
    return torch.bfloat16 if multiplies(torch.bfloat16, device) else torch.float32


@contextmanager
def rounded_products() -> Iterator[None]:
    """Multiply bfloat16 matrices in float32 and round the result, on CPUs without bfloat16.

    The instructions for bfloat16 do the same, so values agree up to the order of summation. This
    lets a comparison in bfloat16 go on on a CPU without them, at the speed of float32. On other
    CPUs nothing changes. It replaces the products of the whole process, forward and backward, so
    only commands should use it.
    """
    if multiplies(torch.bfloat16):
        yield
        return
    library = torch.library.Library("aten", "IMPL", "CPU")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Warning only once for all operators", UserWarning)
        for name in ("mm", "addmm", "bmm", "baddbmm"):
            library.impl(name, partial(_rounded, getattr(torch.ops.aten, name).out))
    try:
        yield
    finally:
        library._destroy()


def _rounded(product: Callable[..., Tensor], *matrices: Tensor, **factors: float) -> Tensor:
    """A product of matrices, of bfloat16 ones in float32 and rounded; others as they are."""
    half = matrices[-1].dtype == torch.bfloat16
    if half:
        matrices = tuple(matrix.float() for matrix in matrices)
    result = product(*matrices, **factors, out=matrices[-1].new_empty(0))
    return result.bfloat16() if half else result
