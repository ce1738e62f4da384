"""CPU implementations: checks, raw pointers to `_C`, memory from torch alone."""

from __future__ import annotations

from catapult_ext.ops import reference
from catapult_ext.ops._schema import register_backend

register_backend(
    "CPU",
    {
        "ntk_gram_": reference.ntk_gram_,
        "ntk_gram_cross_": reference.ntk_gram_cross_,
        "jacobian_accumulate_.tile": reference.jacobian_accumulate_tile_,
        "jacobian_accumulate_.tokens": reference.jacobian_accumulate_tokens_,
        "jacobian_accumulate_.conv2d": reference.jacobian_accumulate_conv2d_,
        "topk_eigh": reference.topk_eigh,
        "spectral_norm": reference.spectral_norm,
        "agop_reduce_": reference.agop_reduce_,
        "agop_inner": reference.agop_inner,
    },
)
