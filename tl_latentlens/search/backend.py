"""The compiled kernels that this machine can run, and the quantized codes that its processor multiplies fast."""

from functools import cache
from importlib import import_module
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor

from tl_latentlens.search.settings import active_settings

# Without VNNI, signed bytes of queries go up to this: AVX2 adds two products with unsigned bytes in 16 bits, and
# 2 * 255 * 64 < 2^15.
MAX_AVX2_CODE = 64


def cpu_kernels(device: torch.device, n_rows: int) -> Any:
    """The module of compiled kernels, or None: another device, no numba, or too few rows to be worth compiling."""
    settings = active_settings()
    if device.type != "cpu" or not settings.use_cpu_kernels or n_rows < settings.min_kernel_rows:
        return None
    return load_cpu_kernels()


@cache
def load_cpu_kernels() -> Any:
    """The module of loops that numba compiles, or None."""
    try:
        return import_module("tl_latentlens.search.cpu_kernels")  # This imports numba, an extra.
    except ImportError:  # numba is not installed, or not for this NumPy
        return None


@cache
def gpu_kernels() -> Any:
    """The module of Triton kernels after a trial, or None: no Triton, no C compiler for it, or a GPU that it does not know."""
    try:
        kernels = import_module("tl_latentlens.search.gpu_kernels")  # This imports Triton.
        ones, ids = torch.ones((1, 8), dtype=torch.float32, device="cuda"), torch.zeros(1, dtype=torch.int64, device="cuda")
        dot = float(kernels.dot_products(ones, ones, ids, ids, torch.float64))
        is_right = dot * float(kernels.products_with_one_query(ones, ones, 1)) == 64
    except Exception:  # The errors are of many kinds, and torch's operators do the same.
        return None
    return kernels if is_right else None


def dot_product_kernels(device: torch.device, n_rows: int) -> Any:
    """The module whose `dot_products` reads each stored row once, or None: torch must do it."""
    return cpu_kernels(device, n_rows) if device.type == "cpu" else gpu_kernels()


def byte_kernels(device: torch.device, n_rows: int) -> Any:
    """The module of compiled loops where they multiply bytes, or None."""
    kernels = cpu_kernels(device, n_rows)
    return kernels if kernels is not None and kernels.MAX_QUERY_CODE else None


def best_code_dtypes(device: torch.device, n_rows: int) -> list[torch.dtype]:
    """Codes that are multiplied faster than float32, the most precise first: bfloat16 with AMX, bytes on CPUs and NVIDIA."""
    if (code_dtypes := active_settings().code_dtypes) is not None:
        return list(code_dtypes)
    if device.type == "cuda":
        return [torch.int8]
    has_amx = torch.backends.mkldnn.is_available() and getattr(torch.cpu, "_is_amx_tile_supported", bool)()
    has_bytes = byte_kernels(device, n_rows) is not None or _has_vnni() or _multiplies_unsigned()
    return [torch.bfloat16] * has_amx + [byte_code_dtype(device, n_rows)] * has_bytes


def byte_code_dtype(device: torch.device, n_rows: int) -> torch.dtype:
    """The codes of one byte a number that are multiplied fastest: unsigned by compiled loops and with AVX2 alone."""
    if byte_kernels(device, n_rows) is not None:
        return torch.uint8
    return torch.uint8 if device.type == "cpu" and not _has_vnni() and _multiplies_unsigned() else torch.int8


def _has_vnni() -> bool:
    return torch.backends.mkldnn.is_available() and getattr(torch.cpu, "_is_vnni_supported", bool)()


@cache
def _multiplies_unsigned() -> bool:
    """True where oneDNN multiplies bytes on a CPU with AVX2, and gets the largest sums right."""
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):  # elsewhere it multiplies them one by one
        return False
    codes = torch.full((32, 64), 255, dtype=torch.uint8)
    signed = torch.full((8, 64), MAX_AVX2_CODE, dtype=torch.int8)
    signed[::2] *= -1
    try:
        product = onednn_products(codes, pack_for_onednn(signed), torch.zeros(8, dtype=torch.float32))
    except (AttributeError, RuntimeError, TypeError):  # a torch whose operator is another, or that was built without it
        return False
    return torch.equal(product, codes.float() @ signed.float().T)


def pack_for_onednn(signed: Int[Tensor, "q d"]) -> Tensor:
    """Signed bytes as oneDNN multiplies them."""
    return torch.ops.onednn.qlinear_prepack(signed, None)


def onednn_products(codes: UInt8[Tensor, "rows d"], packed: Tensor, bias: Float[Tensor, " q"]) -> Float[Tensor, "rows q"]:
    """Products of unsigned bytes with packed signed ones, plus a bias for each of these; sums are of integers."""
    one, zero = torch.ones(1, dtype=torch.float32), torch.zeros(1, dtype=torch.int64)
    return torch.ops.onednn.qlinear_pointwise(codes, 1.0, 0, packed, one, zero, bias, 1.0, 0, torch.float32, "none", [], "")
