"""FP8 attention as PyTorch operators: `fasim::attention_e4m3` and `fasim::quantise_e4m3`, forward only.

On an H100 or H200 the kernels of cuda/fp8 run; on the CPU their arithmetic is emulated bit by bit and slowly (`emulate`).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...simulator.errors import UsageError
from ..arguments import check_inputs, default_scale, flag_of, scale_of
from ..cuda.fp8.config import APPROXIMATE, QUERY_ROWS, config_for
from . import emulate
from .arguments import Descales, check, check_forward_only, check_rows_of_keys, two_level_of
from .keyed import GROUP, from_rows_of_keys
from .plain import Quantised
from .quantise import Part, quantise, quantise_blocks

SCHEDULE = "fa3"
DEFAULT_DTYPE = torch.bfloat16
"""O's where Q, K and V are e4m3, as in FlashAttention-3."""


def is_e4m3(q: object, k: object, v: object) -> bool:
    """Whether any of them is e4m3, so that the call is one for FP8."""
    return any(isinstance(x, Tensor) and x.dtype == torch.float8_e4m3fn for x in (q, k, v))


def kv_rows(head_dim: int, seqlen_k: int, two_level: int | None = None, approximate: bool = False) -> int:
    """Rows of K and V to a descale: the kernel's own block. UsageError where two_level or approximate is not possible."""
    chosen = config_for(SCHEDULE, "bf16", head_dim, False, seqlen_k, two_levels=bool(two_level), approximate=approximate)
    return chosen.fit.tile.block_n


def attend(
    q: Tensor, k: Tensor, v: Tensor, descales: Descales, softmax_scale: float | None, causal: bool, observed: bool
) -> tuple[Tensor, Tensor]:
    """O in bf16 and LSE of e4m3 tensors with descales of (B, H_kv), for `ops.flash_attn_func`; `observed` as there."""
    check_forward_only(q, k, v, *descales)
    check(q, k, v, descales, softmax_scale, DEFAULT_DTYPE)
    scale = scale_of(softmax_scale, q.shape[3])
    call = attention_e4m3 if observed else run
    return call(q, k, v, *descales, scale, causal, DEFAULT_DTYPE)


def flash_attn_fp8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float | None = None,
    causal: bool = False,
    *,
    hadamard: bool = True,
    block_scales: bool = True,
    two_level: int | None = None,
    approximate: bool = False,
    return_lse: bool = False,
    seed: int = 0,
) -> Tensor | tuple[Tensor, Tensor]:
    """softmax(scale * Q K^T) V in e4m3 from 16-bit tensors, O in their dtype; with return_lse, (O, LSE). Forward only.

    Shapes, masks and LSE are those of flash_attn_func; softmax_scale is above 0. Q, K and V are quantised on the way
    (`quantise`): `block_scales` gives every block of rows its descale, else each batch entry and K/V head has one; with them, and
    without two_level, V is written as rows of keys (`keyed`), which spares the kernel its transposition; `hadamard`
    multiplies Q and K by the signs of `seed` and the Hadamard matrix first. P V of `two_level` K/V blocks is added up apart and
    then to O in fp32, against the 14 bits that Hopper's tensor cores keep; None leaves it to them. head_dim 256 has no registers
    for it. `approximate` takes half of the exponentials along lines between powers of two, within 4 %: faster at head_dim 64 and
    128, the error of P a tenth larger, LSE off by up to 0.03 (cuda/fp8/NOTES.md). Raises UsageError, one sentence.
    """
    causal, blocks, approximate = flag_of(causal), two_level_of(two_level), bool(approximate)
    check_inputs(q, k, v, "fa3 in FP8")
    check_forward_only(q, k, v)
    softmax_scale = default_scale(q.shape[3]) if softmax_scale is None else scale_of(softmax_scale, q.shape[3])
    if not softmax_scale > 0:
        raise UsageError(f"softmax_scale={softmax_scale} is not above 0, as the FP8 kernels need it")
    own = kv_rows(q.shape[3], k.shape[1], blocks, approximate)
    rows = (QUERY_ROWS, own, own) if block_scales else (0, 0, 0)
    keyed = bool(block_scales) and not blocks
    if block_scales:
        q8, q_scale, k8, k_scale, v8, v_scale = quantise_blocks_e4m3(q, k, v, *rows[:2], bool(hadamard), seed, keyed)
    else:
        group = q.shape[2] // max(1, k.shape[2])
        (q8, q_scale), (k8, k_scale), (v8, v_scale) = (
            quantise_e4m3(x, 0, sharing, rotated, seed)
            for x, sharing, rotated in ((q, group, bool(hadamard)), (k, 1, bool(hadamard)), (v, 1, False))
        )
    o, lse = attention_e4m3(
        q8, k8, v8, q_scale, k_scale, v_scale, softmax_scale, causal, q.dtype, rows[0], rows[1], blocks, approximate, keyed
    )
    return (o, lse) if return_lse else o


@torch.library.custom_op("fasim::quantise_e4m3", mutates_args=())
def quantise_e4m3(
    x: Tensor, block: int, group: int = 1, hadamard: bool = False, seed: int = 0, powers: bool = False
) -> tuple[Tensor, Tensor]:
    """e4m3 values and descales of `quantise.quantise`; block 0 gives one descale to `group` heads."""
    found = quantise(x, block or None, group=group, hadamard=hadamard, seed=seed, powers=powers)
    return found.values, found.descale


@quantise_e4m3.register_fake
def _(x, block, group=1, hadamard=False, seed=0, powers=False):
    batch, seqlen, heads, _ = x.shape
    shape = (batch, heads, -(-seqlen // block)) if block else (batch, heads // group)
    return torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device), x.new_empty(shape, dtype=torch.float32)


@torch.library.custom_op("fasim::quantise_blocks_e4m3", mutates_args=())
def quantise_blocks_e4m3(
    q: Tensor, k: Tensor, v: Tensor, q_block: int, kv_block: int, hadamard: bool = False, seed: int = 0, keyed: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """e4m3 values and descales of q, of k and of v, in one launch: what attention_e4m3 takes. V's descales are powers of two."""
    parts = [Part(q, q_block, hadamard), Part(k, kv_block, hadamard), Part(v, kv_block, powers=True, keyed=keyed)]
    (q8, q_scale, _), (k8, k_scale, _), (v8, v_scale, _) = quantise_blocks(parts, seed)
    return q8, q_scale, k8, k_scale, v8, v_scale


@quantise_blocks_e4m3.register_fake
def _(q, k, v, q_block, kv_block, hadamard=False, seed=0, keyed=False):
    found = []
    for x, block, across in ((q, q_block, False), (k, kv_block, False), (v, kv_block, keyed)):
        batch, seqlen, heads, head_dim = x.shape
        shape = (batch, heads, head_dim, -(-seqlen // GROUP) * GROUP) if across else x.shape
        found += [torch.empty(shape, dtype=torch.float8_e4m3fn, device=x.device)]
        found += [x.new_empty((batch, heads, -(-seqlen // block)), dtype=torch.float32)]
    return tuple(found)


@torch.library.custom_op("fasim::attention_e4m3", mutates_args=())
def attention_e4m3(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_descale: Tensor | None,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
    softmax_scale: float,
    causal: bool = False,
    dtype: torch.dtype = DEFAULT_DTYPE,
    q_block: int = 0,
    kv_block: int = 0,
    two_level: int = 0,
    approximate: bool = False,
    keyed: bool = False,
) -> tuple[Tensor, Tensor]:
    """O of `dtype` and LSE of e4m3 tensors; descales are (B, H_kv), or (B, H, blocks) where q_block and kv_block are not 0.

    With `keyed`, which has no two levels, v is rows of keys (`keyed.as_rows_of_keys`).
    """
    descales = (q_descale, k_descale, v_descale)
    return run(q, k, v, *descales, softmax_scale, causal, dtype, q_block, kv_block, two_level, approximate, keyed)


@attention_e4m3.register_fake
def _(
    q, k, v, q_descale, k_descale, v_descale, softmax_scale,
    causal=False, dtype=DEFAULT_DTYPE, q_block=0, kv_block=0, two_level=0, approximate=False, keyed=False,
):  # fmt: skip
    batch, seqlen_q, heads, _ = q.shape
    return q.new_empty(q.shape, dtype=dtype), q.new_empty((batch, heads, seqlen_q), dtype=torch.float32)


def run(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_descale: Tensor | None,
    k_descale: Tensor | None,
    v_descale: Tensor | None,
    softmax_scale: float,
    causal: bool = False,
    dtype: torch.dtype = DEFAULT_DTYPE,
    q_block: int = 0,
    kv_block: int = 0,
    two_level: int = 0,
    approximate: bool = False,
    keyed: bool = False,
) -> tuple[Tensor, Tensor]:
    """What the operator does."""
    descales = (q_descale, k_descale, v_descale)
    if keyed and two_level:
        raise UsageError("keyed=True has no kernel with two_level: leave one of them out")
    if keyed and q.is_cuda:
        from ..cuda.fp8 import keyed_launch

        return keyed_launch.forward(q, k, v, *descales, softmax_scale, causal, dtype, bool(q_block), approximate)
    if q.is_cuda:
        from ..cuda.fp8.launch import forward

        return forward(q, k, v, *descales, softmax_scale, causal, dtype, SCHEDULE, bool(q_block), two_level, approximate)
    if q.device.type != "cpu":
        raise UsageError(f"q is on {q.device.type!r}; FP8 attention runs on an H100 or H200, and is emulated on the CPU")
    rows = (q_block, kv_block, kv_block) if q_block else ()
    if keyed:
        check_rows_of_keys(k, v)
        v = from_rows_of_keys(v, k.shape[1])
    check(q, k, v, descales, softmax_scale, dtype, rows)
    ones = q.new_ones((q.shape[0], k.shape[2]), dtype=torch.float32)
    quantised = [
        Quantised(x, ones if descale is None else descale, block or None)
        for x, descale, block in zip((q, k, v), descales, rows or (0, 0, 0), strict=True)
    ]
    block = kv_rows(q.shape[3], k.shape[1], two_level, approximate)
    line_keys = APPROXIMATE[q.shape[3]] if approximate else 0
    arithmetic = replace(emulate.OURS, block=block, two_level=two_level or None, line_keys=line_keys)
    o, lse = emulate.attention(*quantised, softmax_scale, causal, arithmetic)
    return o.to(dtype), lse
