"""What Gluon has no word for, said in inline assembly: named barriers, and P carried from step to step as packed pairs.

An instruction is said through a tensor of one element a thread, so that each thread of the partition executes it once.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


@gluon.jit
def _by_each_thread(number):
    """`number` as one element a thread of this partition."""
    layout: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
    return gl.full([32 * gl.num_warps()], 0, gl.int32, layout) + number


@gluon.constexpr_function
def _said(instruction, threads):
    return f"{instruction} $1, {threads}; mov.b32 $0, $1;"


@gluon.jit
def arrive_at(barrier, THREADS: gl.constexpr):
    """Arrive at a named barrier of THREADS threads, warp by warp, and go on (PTX ISA, barrier.arrive)."""
    gl.inline_asm_elementwise(
        _said("bar.arrive", THREADS), "=r,r", [_by_each_thread(barrier)], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def wait_at(barrier, THREADS: gl.constexpr):
    """Wait at a named barrier until THREADS threads have arrived, these among them (PTX ISA, barrier.sync)."""
    gl.inline_asm_elementwise(_said("bar.sync", THREADS), "=r,r", [_by_each_thread(barrier)], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def packed(weights, dtype: gl.constexpr):
    """fp32 (rows, columns) as 32-bit pairs (rows, columns / 2) of `dtype`, which a loop carries as they are."""
    rows: gl.constexpr = weights.shape[0]
    pairs: gl.constexpr = weights.shape[1] // 2
    even, odd = gl.split(gl.reshape(weights, [rows, pairs, 2]))
    INSTRUCTION: gl.constexpr = "cvt.rn.bf16x2.f32 $0, $2, $1;" if dtype == gl.bfloat16 else "cvt.rn.f16x2.f32 $0, $2, $1;"
    return gl.inline_asm_elementwise(INSTRUCTION, "=r,f,f", [even, odd], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def unpacked(pairs, dtype: gl.constexpr):
    """The inverse: (rows, columns / 2) pairs as (rows, columns) of `dtype`."""
    rows: gl.constexpr = pairs.shape[0]
    columns: gl.constexpr = pairs.shape[1] * 2
    even, odd = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [pairs], dtype=[gl.int16, gl.int16], is_pure=True, pack=1
    )
    return gl.reshape(gl.join(even.to(dtype, bitcast=True), odd.to(dtype, bitcast=True)), [rows, columns])
