"""The backward's schedules, siblings: read two side by side and the difference is the idea."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from ...code.gradients import Gradients
from ..kernel import Kernel, Schedule
from .across import across
from .ahead import ahead
from .apart import apart
from .covered import covered
from .cudnn import cudnn
from .delta import postprocess, prepare, preprocess
from .drained import drained
from .fa2 import fa2
from .fa3 import fa3
from .halves import halves
from .keys_first import keys_first
from .lagged import lagged
from .late import late
from .narrow import narrow
from .registers import registers
from .relay import relay
from .standard import dk, dp, dq, ds, dv
from .warp_specialized import warp_specialized
from .wide import wide

_MMA, _WGMMA = Gradients(wgmma=False), Gradients(wgmma=True, added_bytes=16)
_OURS = replace(_WGMMA, around=235, asks=True, begin=110)
"""SASS of kernels/cuda/backward: `apart` has 359 instructions a block at d128, 480 at d64; 110 lie before the roles; the load
that says whether a block is masked stands behind the wait for its scores, before their exponentials."""
_CUDNN = Gradients(True, 16, weight_fma=2, gradient_fma=3, statistic_alu=2, mask_alu=3, masked=4)
"""From Nsight Compute's listing (cuDNN 9.19, d64 and d128): scores times the scale less LSE, and times log2(e) apart; dS scaled;
whether an LSE or a delta is -inf; a mask of 66 ISETP and 32 FSEL for 32 elements in the first four blocks of a tile. A block and
warp have 624 instructions at d128, full, 572 causal; 521 and 483 at d64."""
_WALK = frozenset({"Q", "dO", "LSE", "delta", "P", "dS", "dQ"})
"""What a CTA of a tile of keys walks: all that belongs to queries."""
_BEFORE, _AFTER, _PREPARE = (
    Kernel(body, "rows", frozenset(), code=_MMA, plain=True, skips_masked=False) for body in (preprocess, postprocess, prepare)
)
_FINISHERS = {lagged: (4, 16), apart: (2, 8), relay: (2, 8)}
"""Ours that have kernels, which write dQ out themselves (kernels/cuda/backward/finish.cuh): by so many warps of a CTA, in so many
rounds a share of 16 KiB."""

_LIVE = (("dK", "dV", "S^T", "dP^T"), ("dK", "dV", "dQ^T"))


def _hopper(name: str, body: Callable, summary: str, paper: str, live: tuple[tuple[str, ...], ...] = _LIVE) -> Schedule:
    theirs = {"code": _CUDNN, "section_bytes": 1} if body is cudnn else {"code": _WGMMA}  # a head's tiles before the next one's
    if body in _FINISHERS:
        theirs = {"code": replace(_OURS, last_apart=body is not relay), "persistent": True, "finishers": _FINISHERS[body]}
    main = Kernel(body, "columns", _WALK, live=live, **theirs)
    kernels = (_PREPARE, main) if body in _FINISHERS else (_BEFORE, main, _AFTER)
    family = "lagged backward" if body in (lagged, covered, ahead, apart, halves, relay) else "hopper backward"
    others = {narrow: "narrow backward", cudnn: "cudnn backward", across: "across backward", late: "across backward"}
    family = others.get(body, family)
    dims = dict.fromkeys((wide, narrow, halves, relay), (256,)) | dict.fromkeys((ahead, across, late), (128,))
    dims = dims.get(body, (64, 128))
    return Schedule(name, summary, paper, family, kernels, head_dims=dims, direction="backward")


ALL = (
    Schedule(
        "standard",
        "five kernels; P, dP and dS go through HBM",
        "FlashAttention (arXiv:2205.14135) Algorithm 3",
        "standard backward",
        (
            Kernel(dv, "columns", _WALK, skips_masked=False, code=_MMA, live=(("dV",),)),
            Kernel(dp, "tiles", skips_masked=False, code=_MMA, live=(("dP",),)),
            Kernel(ds, "rows", frozenset({"P", "dP", "dS"}), skips_masked=False, by_row=True, code=_MMA, live=(("dP",),)),
            Kernel(dq, "rows", frozenset({"dS", "K"}), skips_masked=False, code=_MMA, live=(("dQ",),)),
            Kernel(dk, "columns", _WALK, skips_masked=False, code=_MMA, live=(("dK",),)),
        ),
        direction="backward",
    ),
    Schedule(
        "fa2",
        "K/V outer loop, dK and dV stay in registers, dQ by atomic adds; cp.async and mma.sync",
        "FlashAttention-2 (arXiv:2307.08691) Algorithm 2",
        "mma backward",
        (_BEFORE, Kernel(fa2, "columns", _WALK, code=_MMA, live=(("dK", "dV", "S", "dP"), ("dK", "dV", "dQ"))), _AFTER),
        direction="backward",
    ),
    _hopper(
        "warp-specialized", warp_specialized,
        "a producer warp loads; scores transposed, so that P^T and dS^T stay in registers; dQ added from registers",
        "FlashAttention-3 (arXiv:2407.08608) section 3.1, for its backward",
    ),
    _hopper(
        "drained", drained, "dQ leaves through shared memory by a warp of its own, in bulk copies that add",
        "FlashAttention-3's source (hopper/), PTX ISA cp.reduce.async.bulk",
    ),
    _hopper(
        "fa3", fa3, "five GEMMs in an order that keeps one in flight: S and dP together, dV under dS, dQ's way out under dK",
        "FlashAttention-3 (arXiv:2407.08608), its source, and FlashAttention-4's for Hopper",
    ),
    _hopper(
        "keys-first", keys_first, "dK before dQ, so that the warpgroups meet over dS under it",
        "ours; dK needs a warpgroup's own dS alone",
    ),
    _hopper(
        "registers", registers, "fa3, but dQ is added from registers and never goes through shared memory",
        "ours; FlashAttention-4's for d256 on Hopper does so",
    ),
    _hopper(
        "lagged", lagged, "dQ is formed a block later, under the next exponentials, so that no warpgroup waits for the other's dS",
        "ours; as FlashAttention-3 section 3.2 defers PV in the forward",
        (("dK", "dV", "P^T", "dP^T", "dS^T"), ("dK", "dV", "S^T", "dQ^T", "P^T")),
    ),
    _hopper(
        "covered", covered, "lagged, but dQ leaves under dP and dV, in registers that head_dim 64 has",
        "ours",
        (("dK", "dV", "P^T", "dP^T", "dQ^T"), ("dK", "dV", "S^T", "dQ^T", "dS^T")),
    ),
    _hopper(
        "ahead", ahead, "lagged, but the next scores are issued behind dK, ahead of the wait for it, and dP amid the exponentials",
        "ours",
        (("dK", "dV", "S^T", "P^T", "dQ^T"), ("dK", "dV", "S^T", "dP^T", "P^T"), ("dK", "dV", "S^T", "dS^T", "P^T")),
    ),
    _hopper(
        "apart", apart, "lagged, but a third warpgroup forms dQ, so that the consumers share nothing within a block",
        "ours; ThunderKittens gives all of dQ to one warpgroup too",
        (("dK", "dV", "S^T", "P^T"), ("dK", "dV", "P^T", "dP^T")),
    ),
    _hopper(
        "across", across, "apart, but blocks of 80 queries, which need less of shared memory, and dQ transposed; d128",
        "ours; FlashAttention-4's tile for d128 on Hopper",
        (("dK", "dV", "S^T"), ("dK", "dV", "P^T", "dP^T")),
    ),
    _hopper(
        "late", late, "across, but dS is put behind dV and dK, under which stores cost the GEMMs nothing; d128",
        "ours",
        (("dK", "dV", "S^T"), ("dK", "dV", "P^T", "dP^T")),
    ),
    _hopper(
        "cudnn", cudnn, "cuDNN's order: dP under the exponentials alone, dK waited for before dQ, dQ before the next block",
        "cuDNN 9.19, from the machine code of its kernels on an H200 (Nsight Compute's listing)",
    ),
    _hopper(
        "wide", wide, "for head_dim 256: dK and dV transposed, P through shared memory, dQ added from registers in halves",
        "FlashAttention-4's for d256 on Hopper (flash_attn/cute)",
        (("dK^T", "dV^T", "S", "dP"), ("dK^T", "dV^T", "dQ/2")),
    ),
    _hopper(
        "narrow", narrow, "for head_dim 256: wide, but so few keys that dQ leaves through shared memory",
        "FlashAttention-4's for d256 on Hopper (flash_attn/cute, 4.0.0b36)",
        (("dK^T", "dV^T", "S", "dP"), ("dK^T", "dV^T", "dQ")),
    ),
    _hopper(
        "halves", halves, "for head_dim 256: one warpgroup forms S, the other dP, and each half of the head dim of dV, dK and dQ",
        "ours",
        (("dK", "dV", "S^T", "S^T", "dQ/2"),),
    ),
    _hopper(
        "relay", relay, "for head_dim 256: three warpgroups hand on to one another: S, P and dV; dP, dS and dK; dQ",
        "ours",
        (("dK", "dV", "S^T", "P^T"),),
    ),
)  # fmt: skip
