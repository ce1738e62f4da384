"""Signatures of the compiled module, written by `make stub` and kept equal by a test."""

from collections.abc import Sequence

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
def chain_sgd(
    dtype: int,
    fields: list,
    numbers: Sequence[float],
    x: int,
    x_stride: int,
    y: int,
    y_stride: int,
    batch_index: int,
    batch_sizes: int,
    rates: int,
    observed: int,
    steps: int,
    loss_limit: float,
    tol: float,
    losses: int,
    lambda_1: int,
) -> int: ...
def compile_info() -> dict: ...
def cuda_agop_inner(
    arg0: int,
    arg1: int,
    arg2: int,
    arg3: int,
    arg4: int,
    arg5: int,
    arg6: int,
    arg7: int,
    arg8: int,
    arg9: int,
    arg10: int,
    arg11: int,
    arg12: int,
    arg13: int,
    arg14: int,
) -> None: ...
def cuda_agop_inner_workspace(
    arg0: int,
    arg1: int,
    arg2: int,
    arg3: int,
    arg4: int,
    arg5: int,
    arg6: int,
    arg7: int,
    arg8: int,
    arg9: int,
    arg10: int,
) -> int: ...
def cuda_agop_reduce(
    arg0: int,
    arg1: int,
    arg2: int,
    arg3: int,
    arg4: int,
    arg5: int,
    arg6: int,
    arg7: int,
    arg8: int,
    arg9: int,
    arg10: float,
    arg11: int,
    arg12: int,
) -> None: ...
def cuda_agop_reduce_workspace(
    arg0: int, arg1: int, arg2: int, arg3: int, arg4: int, arg5: int, arg6: float, arg7: int, arg8: int
) -> int: ...
def cuda_jacobian_conv2d(
    arg0: int,
    arg1: int,
    arg2: int,
    arg3: int,
    arg4: int,
    arg5: Sequence[int],
    arg6: Sequence[int],
    arg7: int,
    arg8: Sequence[int],
    arg9: int,
    arg10: Sequence[int],
    arg11: float,
    arg12: int,
    arg13: int,
    arg14: int,
    arg15: int,
    arg16: int,
    arg17: int,
    arg18: int,
) -> None: ...
def cuda_jacobian_conv2d_workspace(
    arg0: int,
    arg1: Sequence[int],
    arg2: Sequence[int],
    arg3: int,
    arg4: Sequence[int],
    arg5: int,
    arg6: Sequence[int],
    arg7: float,
    arg8: int,
    arg9: int,
    arg10: int,
    arg11: int,
    arg12: int,
    arg13: int,
    arg14: int,
) -> int: ...
def cuda_jacobian_tile(
    arg0: int,
    arg1: int,
    arg2: int,
    arg3: int,
    arg4: int,
    arg5: int,
    arg6: int,
    arg7: int,
    arg8: int,
    arg9: int,
    arg10: int,
    arg11: int,
    arg12: int,
    arg13: int,
    arg14: int,
) -> None: ...
def cuda_jacobian_tile_workspace(
    arg0: int,
    arg1: int,
    arg2: int,
    arg3: int,
    arg4: int,
    arg5: int,
    arg6: int,
    arg7: int,
    arg8: int,
    arg9: int,
    arg10: int,
) -> int: ...
def cuda_ntk_gram(
    arg0: int,
    arg1: int,
    arg2: int,
    arg3: int,
    arg4: int,
    arg5: bool,
    arg6: int,
    arg7: int,
    arg8: int,
    arg9: Sequence[
        tuple[
            tuple[int, int, int, int, int, int, int],
            tuple[int, int, int, int, int, int, int],
            int,
            int,
            float,
            float,
        ]
    ],
    arg10: int,
    arg11: int,
    arg12: bool,
    arg13: int,
) -> None: ...
def cuda_ntk_gram_workspace(
    arg0: int,
    arg1: bool,
    arg2: int,
    arg3: int,
    arg4: int,
    arg5: Sequence[
        tuple[
            tuple[int, int, int, int, int, int, int],
            tuple[int, int, int, int, int, int, int],
            int,
            int,
            float,
            float,
        ]
    ],
    arg6: int,
    arg7: int,
    arg8: bool,
    arg9: int,
) -> int: ...
def cuda_spectral_norm(
    arg0: int,
    arg1: int,
    arg2: int,
    arg3: int,
    arg4: int,
    arg5: int,
    arg6: int,
    arg7: int,
    arg8: int,
    arg9: int,
    arg10: float,
    arg11: int,
    arg12: int,
) -> None: ...
def cuda_spectral_norm_workspace(arg0: int, arg1: int, arg2: int, arg3: int, arg4: int) -> int: ...
def cuda_status() -> dict: ...
def cuda_topk_eigh(
    arg0: int,
    arg1: int,
    arg2: int,
    arg3: int,
    arg4: int,
    arg5: int,
    arg6: int,
    arg7: int,
    arg8: int,
    arg9: int,
    arg10: int,
    arg11: int,
    arg12: int,
    arg13: float,
    arg14: int,
    arg15: int,
    arg16: int,
    arg17: int,
) -> None: ...
def cuda_topk_eigh_workspace(arg0: int, arg1: int, arg2: int, arg3: int, arg4: int, arg5: int) -> int: ...
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
def rank_updates(dtype: int, fields: list, scale: Sequence, threads: int) -> None: ...
def residual(dtype: int, count: int, prediction: int, target: int, residual: int) -> float: ...
def same_bytes(left: int, right: int, count: int) -> bool: ...
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
    threads: int,
) -> list[int]: ...
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
    threads: int,
) -> list[int]: ...
