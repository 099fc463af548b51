"""The quantiser: 16 bits to e4m3 and fp32 descales, in one fused pass on a GPU and in plain torch on the CPU, bit for bit alike."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ...simulator.errors import UsageError
from ..arguments import HEAD_DIMS, is_dense
from . import plain
from .keyed import as_rows_of_keys
from .plain import E4M3, Part, Quantised

__all__ = ["E4M3", "Part", "Quantised", "quantise", "quantise_blocks"]

MOST_ROWS = 256
"""Rows of one block: the fused kernel holds them in registers."""


def quantise(
    x: Tensor,
    block: int | None = 128,
    *,
    per: str = "head",
    group: int = 1,
    hadamard: bool = False,
    seed: int = 0,
    powers: bool = False,
) -> Quantised:
    """x (B, S, H, D), fp16 or bf16, any strides, in e4m3 with descales as `plain` defines them.

    `block` rows of one head share a descale, (B, H, blocks). With block=None it is (B, H / group): one for the `group` heads
    that share a K/V head (`per`="head"), or the same for the whole tensor (`per`="tensor"). `hadamard` first multiplies each
    row by the signs of `seed` and the Hadamard matrix (`rotation`): the same for Q and K. `powers` takes the next power of two as
    a descale: V's blocks want that, whose descales are in P. Raises UsageError, one sentence.
    """
    if not isinstance(x, Tensor) or x.dtype not in (torch.float16, torch.bfloat16) or x.dim() != 4 or not is_dense(x):
        found = f"{x.dtype} of {tuple(x.shape)}" if isinstance(x, Tensor) else f"a {type(x).__name__}"
        raise UsageError(f"the quantiser takes a dense float16 or bfloat16 tensor (B, S, H, D), and x is {found}")
    if x.shape[3] not in HEAD_DIMS:
        raise UsageError(f"head_dim={x.shape[3]} is not supported in FP8 ({', '.join(map(str, HEAD_DIMS))}): pad x with zeros")
    if block is not None and not (isinstance(block, int) and 0 < block <= MOST_ROWS):
        raise UsageError(f"block={block!r} is not possible: give 1 to {MOST_ROWS} rows, or None for one descale a head")
    if per not in ("head", "tensor"):
        raise UsageError(f"per={per!r} is not possible: give 'head' or 'tensor'")
    if group < 1 or x.shape[2] % group:
        raise UsageError(f"group={group} does not divide {x.shape[2]} heads")
    if not x.is_cuda:
        return plain.quantise(x, block, per=per, group=group, hadamard=hadamard, seed=seed, powers=powers)
    if block is not None:
        (found,) = quantise_blocks([Part(x, block, hadamard, powers)], seed)
        return found
    from . import fused

    with torch.cuda.device(x.device):
        return fused.quantise(x, None, per=per, group=group, hadamard=hadamard, seed=seed, powers=powers)


def quantise_blocks(parts: Sequence[Part], seed: int = 0) -> list[Quantised]:
    """What `quantise` gives of up to three tensors of one head_dim, dtype and device; on a GPU in one launch where it can.

    Of a part that is `keyed` the values are rows of keys (keyed.py).
    """
    if not parts[0].x.is_cuda:
        return [_laid(part, plain.quantise(part.x, part.block, **_choices(part, seed))) for part in parts]
    from ..cuda.fp8 import quantise as streamed
    from . import fused

    with torch.cuda.device(parts[0].x.device):
        if streamed.takes(parts):
            found = streamed.quantise(parts, seed)
            return [Quantised(*each, part.block) for each, part in zip(found, parts, strict=True)]
        if len(parts) > 1:
            return [each for part in parts for each in quantise_blocks([part], seed)]
        (part,) = parts
        return [_laid(part, fused.quantise(part.x, part.block, **_choices(part, seed)))]


def _choices(part: Part, seed: int) -> dict:
    return {"hadamard": part.hadamard, "seed": seed, "powers": part.powers}


def _laid(part: Part, found: Quantised) -> Quantised:
    """As the part wants its values to lie."""
    return found._replace(values=as_rows_of_keys(found.values)) if part.keyed else found
