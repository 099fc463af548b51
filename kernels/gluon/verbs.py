"""What every rung of the ladder says: load a tile by TMA, wait for it, multiply, softmax one block, write O and LSE.

Q, K, V and O are seen as [B, H, S, D] through tensor maps, in boxes of rows of one head. A tile lies in shared memory as WGMMA
reads it, in 128-byte swizzled rows. Scores stay unscaled in fp32; the scale is folded into the exponent's FMA, in base 2.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma, warpgroup_mma

LN_2 = gl.constexpr(0.6931471805599453)

# Named otherwise from Triton 3.7 on.
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
tma_store = tma.async_store if hasattr(tma, "async_store") else tma.async_copy_shared_to_global


@gluon.constexpr_function
def tile_layout(rank, dtype):
    """A tile of 16-bit elements in shared memory, as TMA writes and WGMMA reads it."""
    return gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=dtype.primitive_bitwidth, rank=rank)


@gluon.constexpr_function
def accumulator_layout(columns, warps):
    """An fp32 accumulator of 16 rows a warp."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[warps, 1], instr_shape=[16, columns, 16])


@gluon.jit
def load_rows(source, target, full, batch, head, row):
    """Start the load of a tile and let `full` expect its bytes."""
    mbarrier.expect(full, source.block_type.nbytes)
    tma_load(source, [batch, head, row, 0], full, target)


@gluon.jit
def multiply(a, b):
    """Start a b in fp32 on the tensor cores."""
    rows: gl.constexpr = a.shape[0]
    columns: gl.constexpr = b.shape[1]
    nothing = gl.zeros([rows, columns], gl.float32, accumulator_layout(columns, gl.num_warps()))
    return warpgroup_mma(a, b, nothing, use_acc=False, is_async=True)


@gluon.jit
def in_quads(scores):
    """(rows, columns) as (rows, columns / 8, 4, 2): what a thread holds of an accumulator's row, its lane in the quad, a pair."""
    rows: gl.constexpr = scores.shape[0]
    groups: gl.constexpr = scores.shape[1] // 8
    return gl.reshape(scores, [rows, groups, 4, 2])


@gluon.jit
def of_threads(scores):
    """Each thread's own sum of a row, (rows, 4): no shuffle."""
    return gl.sum(gl.sum(in_quads(scores), 3), 1)


@gluon.jit
def keys_seen(scores, first_row, key, seqlen_k, offset, CAUSAL: gl.constexpr):
    """Scores of a block with -inf at keys past the end, and above the diagonal.

    The columns that a thread holds are compared as constants, so that no address of a column takes a register.
    """
    layout: gl.constexpr = scores.type.layout
    rows: gl.constexpr = scores.shape[0]
    columns: gl.constexpr = scores.shape[1]
    quads = in_quads(scores)
    by_group: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, gl.SliceLayout(3, quads.type.layout)))
    by_lane: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(3, quads.type.layout)))
    by_pair: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(1, gl.SliceLayout(2, quads.type.layout)))
    by_row: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, gl.SliceLayout(3, quads.type.layout)))
    lane = 2 * gl.arange(0, 4, layout=by_lane)
    pair = gl.arange(0, 2, layout=by_pair)
    group = 8 * gl.arange(0, columns // 8, layout=by_group)
    limit = gl.full([rows], 0, gl.int32, by_row) + (seqlen_k - key)
    if CAUSAL:
        limit = gl.minimum(limit, gl.arange(0, rows, layout=by_row) + (first_row + offset + 1 - key))
    limit = gl.expand_dims(gl.expand_dims(gl.expand_dims(limit, 1), 2), 3)
    limit -= gl.expand_dims(gl.expand_dims(gl.expand_dims(lane, 0), 1), 3)
    limit -= gl.expand_dims(gl.expand_dims(gl.expand_dims(pair, 0), 1), 2)
    seen = gl.expand_dims(gl.expand_dims(gl.expand_dims(group, 0), 2), 3) < limit
    return gl.convert_layout(gl.reshape(gl.where(seen, quads, float("-inf")), [rows, columns]), layout)


@gluon.jit
def softmax(scores, top, total, scale_log2, MASKED: gl.constexpr):
    """Weights exp2(scale (S - maximum)), the factor that shrinks what came before, maxima, and each thread's row sums."""
    higher = gl.maximum(top, gl.max(scores, 1))
    pivot = higher
    if MASKED:  # a row that has seen no key has maximum -inf; 0 in its place gives exp2(-inf) = 0 and not NaN
        pivot = gl.where(higher == float("-inf"), 0.0, higher)
    shift = pivot * scale_log2
    weights = gl.exp2(scores * scale_log2 - gl.expand_dims(shift, 1))
    factor = gl.exp2(top * scale_log2 - shift)
    mine = gl.expand_dims(gl.convert_layout(factor, gl.SliceLayout(1, total.type.layout)), 1)
    return weights, factor, higher, total * mine + of_threads(weights)


@gluon.jit
def made_here(total):
    """The row sums; the assembler may not move what they are made of past this point.

    It would move the exponentials behind the next wait for the tensor cores, under which they are to run. A warp-wide barrier on a
    condition that no sum meets, since none is negative, holds them; a trap or an exit in its place serialises the GEMMs.
    """
    return gl.inline_asm_elementwise(
        "{ .reg .pred p; setp.lt.f32 p, $1, 0f00000000; mov.b32 $0, $1; @p bar.warp.sync 0xffffffff; }",
        "=f,f", [total], dtype=gl.float32, is_pure=False, pack=1,
    )  # fmt: skip
