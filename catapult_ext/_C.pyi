"""Signatures of the compiled module, written by `make stub` and kept equal by a test."""

from collections.abc import Sequence

__file__: str

class InternalError(RuntimeError): ...

def agop_inner(
    dtype: int, g_rows: int, h_rows: int, d: int, g: int, g_stride: int, h: int, h_stride: int, threads: int
) -> float: ...
def agop_reduce(
    dtype: int,
    rows: int,
    d: int,
    g: int,
    g_stride: int,
    scale: float,
    agop: int,
    agop_stride: int,
    threads: int,
) -> bool: ...
def available_simd_levels() -> list[str]: ...
def compile_info() -> dict: ...
def jacobian_accumulate(
    dtype: int,
    rows: int,
    cols: int,
    tile: int,
    tile_stride: int,
    kernel: int,
    kernel_stride: int,
    weight: int,
    grad: int,
    scale: float,
    threads: int,
) -> bool: ...
def ntk_gram(
    dtype: int,
    n: int,
    c: int,
    terms: list,
    scale: Sequence,
    beta: Sequence,
    kernel: int,
    kernel_stride: int,
    accumulate: bool,
    threads: int,
) -> bool: ...
def ntk_gram_cross(
    dtype: int,
    n: int,
    m: int,
    c: int,
    x_terms: list,
    z_terms: list,
    scale: Sequence,
    beta: Sequence,
    kernel: int,
    kernel_stride: int,
    accumulate: bool,
    threads: int,
) -> bool: ...
def set_simd_level(name: str) -> None: ...
def simd_level() -> str: ...
def spectral_norm(
    dtype: int,
    batch: int,
    n: int,
    kernel: int,
    kernel_batch_stride: int,
    kernel_stride: int,
    tol: float,
    values: int,
    status: int,
    threads: int,
) -> None: ...
def topk_eigh(
    dtype: int,
    batch: int,
    n: int,
    k: int,
    kernel: int,
    kernel_batch_stride: int,
    kernel_stride: int,
    start: int,
    start_cols: int,
    tol: float,
    method: int,
    values: int,
    vectors: int,
    residuals: int,
    status: int,
    threads: int,
) -> None: ...
