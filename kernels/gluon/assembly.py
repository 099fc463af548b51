"""What Gluon has no word for, said in inline assembly: named barriers, P carried as packed pairs, and a branch of one warp.

An instruction is said through a tensor of one element a thread, so that each thread of the partition executes it once; what is said
of all that a thread holds, through tensors of one `pack`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

HANDS_OVER = gl.constexpr("=r,r,~{memory}")
"""Constraints of a barrier: no access to memory is moved across it."""


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
        _said("bar.arrive", THREADS), HANDS_OVER, [_by_each_thread(barrier)], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def wait_at(barrier, THREADS: gl.constexpr):
    """Wait at a named barrier until THREADS threads have arrived, these among them (PTX ISA, barrier.sync)."""
    gl.inline_asm_elementwise(
        _said("bar.sync", THREADS), HANDS_OVER, [_by_each_thread(barrier)], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.constexpr_function
def conversion(dtype):
    """The instruction that makes a pair of fp32, the upper first, one of 16 bits each."""
    return "cvt.rn.bf16x2.f32" if dtype.name == "bf16" else "cvt.rn.f16x2.f32"


@gluon.jit
def packed(even, odd, dtype: gl.constexpr):
    """fp32 of even and of odd columns as 32-bit pairs of `dtype`, which a loop carries as they are."""
    INSTRUCTION: gl.constexpr = conversion(dtype) + " $0, $2, $1;"
    return gl.inline_asm_elementwise(INSTRUCTION, "=r,f,f", [even, odd], dtype=gl.int32, is_pure=True, pack=1)


@gluon.jit
def unpacked(pairs, dtype: gl.constexpr):
    """The inverse, with even and odd columns side by side in a last dimension of two."""
    even, odd = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [pairs], dtype=[gl.int16, gl.int16], is_pure=True, pack=1
    )
    return gl.join(even.to(dtype, bitcast=True), odd.to(dtype, bitcast=True))


@gluon.constexpr_function
def weights_anew(pairs, convert):
    """PTX for what a thread holds of S, in `pairs` pairs, of its rows r and r + 8 by turns: the weights that stand, unless a sum of
    some thread of the warp passes 1,024 (or is none). Up to it they fit fp16 and lose nothing; past it the warp looks for its rows'
    maxima and takes all weights anew.

    Results: pairs, row sums, maxima, the factor by which what came before shrinks. Operands: scores of even and odd columns, the
    pairs that stand, their sums, row sums and maxima before, the scale. Of rows, the first two places are read and written.
    """
    limit, minus_infinity, one, zero = "0f44800000", "0fff800000", "0f3f800000", "0f00000000"
    made, total, top, factor, even, odd, stand, sums, before, old, scale = [
        [f"${pairs * kind + i}" for i in range(pairs)] for kind in range(11)
    ]
    say = [
        "{ .reg .pred p, q; .reg .f32 high, t, s, x, y, sum;",
        f"setp.le.f32 p, {sums[0]}, {limit}; setp.le.and.f32 p, {sums[1]}, {limit}, p; vote.sync.all.pred p, p, 0xffffffff;",
    ]
    say += [f"mov.b32 {a}, {b};" for a, b in zip(made, stand, strict=True)]
    for r in (0, 1):
        say += [f"add.f32 {total[r]}, {before[r]}, {sums[r]}; mov.f32 {top[r]}, {old[r]}; mov.f32 {factor[r]}, {one};"]
    say += ["@p bra DONE;"]
    for r in (0, 1):
        say += [f"mov.f32 high, {old[r]};"]
        say += [f"max.f32 high, high, {even[i]}; max.f32 high, high, {odd[i]};" for i in range(r, pairs, 2)]
        say += [f"shfl.sync.bfly.b32 t, high, {lane}, 31, 0xffffffff; max.f32 high, high, t;" for lane in (1, 2)]
        say += [
            f"mov.f32 {top[r]}, high;",
            # A row that has seen no key has maximum -inf; 0 in its place gives exp2(-inf) = 0 and not NaN.
            f"setp.eq.f32 q, high, {minus_infinity}; selp.f32 high, {zero}, high, q;",
            f"mul.f32 s, high, {scale[r]}; neg.f32 s, s; mov.f32 sum, {zero};",
            f"fma.rn.f32 t, {old[r]}, {scale[r]}, s; ex2.approx.ftz.f32 {factor[r]}, t;",
        ]
        for i in range(r, pairs, 2):
            say += [
                f"fma.rn.f32 x, {even[i]}, {scale[r]}, s; fma.rn.f32 y, {odd[i]}, {scale[r]}, s;",
                "ex2.approx.ftz.f32 x, x; ex2.approx.ftz.f32 y, y; add.f32 sum, sum, x; add.f32 sum, sum, y;",
                f"{convert} {made[i]}, y, x;",
            ]
        say += [f"fma.rn.f32 {total[r]}, {before[r]}, {factor[r]}, sum;"]
    return "\n".join([*say, "DONE: }"])


@gluon.constexpr_function
def weights_anew_operands(pairs):
    """Constraints of `weights_anew`."""
    return ",".join(["=r"] * pairs + ["=f"] * 3 * pairs + ["f"] * 2 * pairs + ["r"] * pairs + ["f"] * 4 * pairs)


@gluon.constexpr_function
def shrunk_if_grown(elements):
    """PTX for what a thread holds of O, two columns of row r and two of row r + 8 by turns: each times its factor, unless all of
    the warp's factors are 1."""
    made, given, factor = [[f"${elements * kind + i}" for i in range(elements)] for kind in range(3)]
    say = ["{ .reg .pred p;", *(f"mov.f32 {a}, {b};" for a, b in zip(made, given, strict=True))]
    say += [f"setp.eq.f32 p, {factor[0]}, 0f3f800000; setp.eq.and.f32 p, {factor[2]}, 0f3f800000, p;"]  # 1
    say += ["vote.sync.all.pred p, p, 0xffffffff; @p bra DONE;"]
    say += [f"mul.f32 {a}, {b}, {c};" for a, b, c in zip(made, given, factor, strict=True)]
    return "\n".join([*say, "DONE: }"])


@gluon.constexpr_function
def shrunk_if_grown_operands(elements):
    """Constraints of `shrunk_if_grown`."""
    return ",".join(["=f"] * elements + ["f"] * 2 * elements)
