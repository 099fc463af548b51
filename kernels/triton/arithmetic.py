"""Arithmetic that every kernel shares: base-2 constants and the GEMM with fp32 accumulation."""

from __future__ import annotations

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
"""Whether kernels run in Triton's interpreter, on the CPU; fixed when Triton's kernels are defined."""


@triton.jit
def product(a, b):
    """a b with fp32 accumulation. The interpreter would multiply the bits of bf16, so there both are widened first."""
    return tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee") if INTERPRETED else tl.dot(a, b)


@triton.jit
def gemm(a, b, acc):
    """acc + a b, as `product`."""
    return tl.dot(a.to(tl.float32), b.to(tl.float32), acc, input_precision="ieee") if INTERPRETED else tl.dot(a, b, acc)


@triton.jit
def in_registers(operand):
    """The same 16-bit tensor, as the left operand of a GEMM. Triton stages a left operand that a loop carries in shared memory
    and waits for such a GEMM at once; one that arithmetic has just made stays in registers and the GEMM runs on."""
    if INTERPRETED:
        return operand
    return tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [operand], dtype=operand.dtype, is_pure=True, pack=2)
