"""FlashAttention-3's table of numerical errors (arXiv:2407.08608, Table 3), the paper's column beside it: by our kernels on a GPU,
by emulation on the CPU.

Q, K and V are N(0, 1) + N(0, 100) Bernoulli(0.001). The error is that of O against attention in fp64 of the numbers as drawn,
before they are rounded to fp16. The paper names neither lengths nor head dim.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ...simulator.errors import UsageError
from ...simulator.reading import read_csv
from ..arguments import HEAD_DIMS, default_scale
from ..cuda.fp8.config import FITS_TWO_LEVELS, QUERY_ROWS
from ..ops import flash_attn_func
from ..reference import attention_forward
from .operator import attention_e4m3, kv_rows
from .quantise import quantise

PAPER = Path(__file__).parents[2] / "traces" / "published" / "numerical_error.csv"
TWO_LEVEL = 4
"""K/V blocks of the row that adds P V in two levels."""
MOST = 1 << 17


@dataclass(frozen=True)
class Row:
    """One way to compute attention, and its name in the paper's table where it has one."""

    name: str
    compute: Callable[[Tensor, Tensor, Tensor], Tensor]
    published: tuple[str, str] | None = None


def rows(head_dim: int = 128) -> list[Row]:
    """The table's rows in the paper's order; each takes fp16 (1, S, 1, D) on any device and gives O in fp16."""
    half, byte = "fp16", "fp8_e4m3"
    kept = "FlashAttention-3 (block quantisation + incoherent processing)"
    two_levels = Row(f"the same, P V of {TWO_LEVEL} blocks apart", _in_e4m3(True, True, TWO_LEVEL))
    return [
        Row("standard: S and P in fp16", lambda q, k, v: _in_fp16(q, k, v, True), (half, "standard attention")),
        Row("FlashAttention: S in fp32, P in fp16", lambda q, k, v: _in_fp16(q, k, v, False), (half, "FlashAttention-3")),
        Row("e4m3, one scale a tensor", _in_e4m3(False, False), (byte, "per-tensor scaling")),
        Row("e4m3, block scales", _in_e4m3(True, False), (byte, "FlashAttention-3 without incoherent processing")),
        Row("e4m3, Hadamard", _in_e4m3(False, True), (byte, "FlashAttention-3 without block quantisation")),
        Row("e4m3, block scales and Hadamard", _in_e4m3(True, True), (byte, kept)),
        *([two_levels] if head_dim in FITS_TWO_LEVELS else []),
    ]


def table(
    seqlen: int = 2048,
    head_dim: int = 128,
    queries: int = 128,
    heads: int = 2,
    seed: int = 0,
    device: str = "cpu",
    advance: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> list[dict]:
    """[{method, rmse, least, most, paper}]: the root mean square over `heads` draws of `queries` rows of O, the least and the
    largest of one draw; paper is None where it has no row. `device` "cuda" runs our kernels, "cpu" emulates them.

    Raises UsageError for a size or a device that is none.
    """
    for name, size in (("seqlen", seqlen), ("queries", queries), ("heads", heads)):
        if not 0 < size <= MOST:
            raise UsageError(f"{name}={size} is not possible: give 1 to {MOST:,}")
    if device not in ("cpu", "cuda"):
        raise UsageError(f"device={device!r} is not possible: give cuda or cpu")
    if head_dim not in HEAD_DIMS:
        raise UsageError(f"head_dim={head_dim} is not supported in FP8 ({', '.join(map(str, HEAD_DIMS))})")
    paper = {(row["dtype"], row["method"]): float(row["rmse"]) for row in read_csv(PAPER, "table")} if PAPER.exists() else {}
    listed = rows(head_dim)
    squares: list[list[float]] = [[] for _ in listed]
    generator = torch.Generator().manual_seed(seed)
    for head in range(heads):
        drawn = [outliers((1, n, 1, head_dim), generator).to(device) for n in (queries, seqlen, seqlen)]
        exact = attention_forward(*drawn).o
        for at, row in enumerate(listed):
            advance(head * len(listed) + at, heads * len(listed), row.name)
            squares[at].append(float((row.compute(*(x.half() for x in drawn)).double() - exact).square().mean()))
    return [
        {
            "method": row.name,
            "rmse": math.sqrt(sum(found) / heads),
            "least": math.sqrt(min(found)),
            "most": math.sqrt(max(found)),
            "paper": paper.get(row.published) if row.published else None,
        }
        for row, found in zip(listed, squares, strict=True)
    ]


def named(device: str) -> str:
    """Where a table comes from, in words."""
    return torch.cuda.get_device_name() if device == "cuda" else "emulated on the CPU"


def outliers(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """N(0, 1) + N(0, 100) Bernoulli(0.001) in fp64: section 4.3."""
    draw = (torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    rare = torch.rand(shape, generator=generator) < 0.001
    return next(draw) + 10.0 * next(draw) * rare


def _in_fp16(q: Tensor, k: Tensor, v: Tensor, standard: bool) -> Tensor:
    """Attention of one head with fp32 sums; standard rounds S, before and after it is scaled, and P to fp16. On a GPU
    FlashAttention is our kernel."""
    if q.is_cuda and not standard:
        return flash_attn_func(q, k, v)
    scale = 1.0 / math.sqrt(q.shape[3])
    s = q[0, :, 0].float() @ k[0, :, 0].float().T
    s = (s.half() * torch.tensor(scale).half()).float() if standard else s * scale
    p = torch.softmax(s, -1) if standard else torch.exp(s - s.amax(-1, keepdim=True))
    o = p.half().float() @ v[0, :, 0].float()
    return (o if standard else o / p.sum(-1, keepdim=True)).half()[None, :, None]


def _in_e4m3(blocks: bool, hadamard: bool, two_level: int | None = None) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """FP8 attention by cuda/fp8, or as it computes it, with the kernel's own blocks."""

    def compute(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        own = kv_rows(q.shape[3], k.shape[1], two_level)
        sizes = (QUERY_ROWS, own, own) if blocks else (None,) * 3
        given = [quantise(x, n, hadamard=hadamard) for x, n in zip((q, k), sizes[:2], strict=True)]
        given.append(quantise(v, sizes[2], powers=blocks))
        values, descales = ([getattr(x, name) for x in given] for name in ("values", "descale"))
        rows = (QUERY_ROWS, own) if blocks else (0, 0)
        return attention_e4m3(*values, *descales, default_scale(q.shape[3]), False, torch.float16, *rows, two_level or 0)[0]

    return compute
