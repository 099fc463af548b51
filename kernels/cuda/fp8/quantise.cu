// The quantiser in one pass over memory: 16 bits are read once, e4m3 and one fp32 descale a block of rows are written; with the
// signs and the Hadamard transform of each row on the way. fp8/plain.py says what it gives, to the bit.
//
// A thread holds ELEMENTS of a row, runs of RUN that lie LANES * RUN apart: of the transform's log2 HEAD_DIM exchanges all but
// log2 LANES are between its registers. The next tile's elements are on their way while this one's are transformed. A tile is
// CTA_ROWS rows of one head, one or more whole blocks. Chosen at compile time: HEAD_DIM, BF16, ELEMENTS, CTA_ROWS, CTAS (of an SM).
#include "ptx_fp8.cuh"

#define INFINITE __int_as_float(0x7f800000)

constexpr int LANES = HEAD_DIM / ELEMENTS;
constexpr int RUN = LANES == 2 ? 16 : 8;  // stores of a warp fill sectors of 32 bytes
constexpr int THREADS = CTA_ROWS * LANES, WARPS = THREADS / 32;
constexpr int MOST_OPERANDS = 3;
static_assert(THREADS % 32 == 0 && THREADS <= 1024, "whole warps of one CTA");
static_assert(LANES >= 2 && RUN <= ELEMENTS, "lanes that share a row");

struct Operand {
  const unsigned short* x;
  unsigned char* values;
  float* descale;
  long long stride_b, stride_s, stride_h;  // of x, in elements
  int heads, seqlen, block, blocks;        // rows of a block; blocks of a head
  int tiles, end;                          // tiles of a head; number of the first tile of the next operand
  int hadamard, powers;
};
struct Operands {
  Operand of[MOST_OPERANDS];
  const u32* signs;  // HEAD_DIM / 2 pairs of sign bits
  float normaliser;
  int count;  // tiles
};

// One tile: its operand, and this thread's row of it, past the end where there is no tile.
struct Place {
  int operand, batch, head, row;
};
__device__ __forceinline__ Place place_of(const Operands& p, u32 number) {
  if (number >= (u32)p.count) return {0, 0, 0, 0x7fffffff};
  const int which = (number >= (u32)p.of[0].end) + (number >= (u32)p.of[1].end);
  const Operand& o = p.of[which];
  number -= which == 0 ? 0 : p.of[which - 1].end;
  const u32 rest = number / (u32)o.heads, batch = rest / (u32)o.tiles;  // heads lie side by side in memory
  return {which, (int)batch, (int)(number - rest * o.heads), (int)((rest - batch * o.tiles) * CTA_ROWS + threadIdx.x / LANES)};
}

// Of this thread's elements, the i-th of 8: where in the row.
__device__ __forceinline__ constexpr int column(int i) { return i * 8 / RUN * (LANES * RUN) + i * 8 % RUN; }

__device__ __forceinline__ void load(u32 (&raw)[ELEMENTS / 2], const Operands& p, const Place& at) {
  const Operand& o = p.of[at.operand];
  if (at.row < o.seqlen) {
    const unsigned short* from = o.x + at.batch * o.stride_b + at.row * o.stride_s + at.head * o.stride_h + threadIdx.x % LANES * RUN;
#pragma unroll
    for (int i = 0; i < ELEMENTS / 8; ++i) {
      u32* to = raw + 4 * i;
      asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
                   : "l"(from + column(i)));
    }
  } else {
#pragma unroll
    for (int i = 0; i < ELEMENTS / 2; ++i) raw[i] = 0;
  }
}
__device__ __forceinline__ void flip_signs(u32 (&raw)[ELEMENTS / 2], const u32* signs) {
#pragma unroll
  for (int i = 0; i < ELEMENTS / 8; ++i) {
    const uint4 four = __ldg((const uint4*)(signs + (column(i) + threadIdx.x % LANES * RUN) / 2));
    raw[4 * i] ^= four.x, raw[4 * i + 1] ^= four.y, raw[4 * i + 2] ^= four.z, raw[4 * i + 3] ^= four.w;
  }
}

__device__ __forceinline__ void widen(const u32 (&raw)[ELEMENTS / 2], float (&x)[ELEMENTS]) {
#pragma unroll
  for (int i = 0; i < ELEMENTS / 2; ++i) {
    if constexpr (BF16) {
      x[2 * i] = __uint_as_float(raw[i] << 16);
      x[2 * i + 1] = __uint_as_float(raw[i] & 0xffff0000u);
    } else {
      asm("{\n\t.reg .b16 low, high;\n\tmov.b32 {low, high}, %2;\n\tcvt.f32.f16 %0, low;\n\tcvt.f32.f16 %1, high;\n\t}"
          : "=f"(x[2 * i]), "=f"(x[2 * i + 1])
          : "r"(raw[i]));
    }
  }
}

// The pairs one apart first, as in fp8/rotation.py.
__device__ __forceinline__ void transform(float (&x)[ELEMENTS], float normaliser) {
#pragma unroll
  for (int apart = 1; apart < ELEMENTS; apart *= 2) {
    if (apart == RUN) {
#pragma unroll
      for (int lane = 1; lane < LANES; lane *= 2) {
        const float sign = threadIdx.x & lane ? -1.0f : 1.0f;
#pragma unroll
        for (int i = 0; i < ELEMENTS; ++i) x[i] = __fmaf_rn(x[i], sign, __shfl_xor_sync(0xffffffffu, x[i], lane));
      }
    }
#pragma unroll
    for (int i = 0; i < ELEMENTS; ++i) {
      if (i & apart) continue;
      const float low = x[i], high = x[i + apart];
      x[i] = low + high, x[i + apart] = low - high;
    }
  }
#pragma unroll
  for (int i = 0; i < ELEMENTS; ++i) x[i] *= normaliser;
}

__device__ __forceinline__ u32 magnitude(const float (&x)[ELEMENTS], bool finite) {
  float most = 0.0f;
#pragma unroll
  for (int i = 0; i < ELEMENTS; ++i) {
    const float size = fabsf(x[i]);
    most = fmaxf(most, finite && !(size < INFINITE) ? 0.0f : size);  // NaN counts for nothing
  }
  return __float_as_uint(most);
}
// The largest of a block; bits of floats that are not negative order as integers do. A block's warps meet at a barrier of their own.
__device__ __forceinline__ u32 largest_of(u32 mine, u32* by_warp, int barrier, int first, int warps) {
  mine = __reduce_max_sync(0xffffffffu, mine);
  const int lane = threadIdx.x % 32;
  if (lane == 0) by_warp[threadIdx.x / 32] = mine;
  asm volatile("bar.sync %0, %1;" ::"r"(barrier), "r"(32 * warps) : "memory");
  return __reduce_max_sync(0xffffffffu, lane < warps ? by_warp[first + lane] : 0);
}

extern "C" __global__ void __launch_bounds__(THREADS, CTAS) attention_forward(const __grid_constant__ Operands p) {
  // Of an operand: its even tiles', its odd ones', and where a block has infinity. Warps of other blocks may be tiles ahead, but not
  // of this operand by more than a barrier.
  __shared__ u32 by_warp[MOST_OPERANDS][3][WARPS];
  u32 raw[ELEMENTS / 2];
  load(raw, p, place_of(p, blockIdx.x));
  u32 turns = 0;  // a bit of each operand
  for (int number = blockIdx.x; number < p.count;) {
    const Place at = place_of(p, number);
    const Operand& o = p.of[at.operand];
    float x[ELEMENTS];
    if (o.hadamard) flip_signs(raw, p.signs);
    widen(raw, x);
    number += gridDim.x;
    load(raw, p, place_of(p, number));
    if (o.hadamard) transform(x, p.normaliser);

    const int warp = threadIdx.x / 32, warps = o.block * LANES / 32, block = warp / warps, first = block * warps;
    int barrier = 1 + block;
    for (int before = 0; before < at.operand; ++before) barrier += CTA_ROWS / p.of[before].block;
    u32 bits = largest_of(magnitude(x, false), by_warp[at.operand][turns >> at.operand & 1], barrier, first, warps);
    turns ^= 1u << at.operand;
    if (bits == __float_as_uint(INFINITE)) {  // one that e4m3 does not have: it becomes NaN
      bits = largest_of(magnitude(x, true), by_warp[at.operand][2], barrier, first, warps);
#pragma unroll
      for (int i = 0; i < ELEMENTS; ++i) x[i] = __fmaf_rn(x[i], 0.0f, x[i]);
    }
    float step = fmaxf(__fdiv_rn(__uint_as_float(bits), 448.0f), 1.1754944e-38f);
    if (o.powers) step = __uint_as_float((__float_as_uint(step) + 0x7fffff) & 0xff800000u);
    const float inverse = __fdiv_rn(1.0f, step);
    if (at.row < o.seqlen) {
      const int lane = threadIdx.x % LANES;
      unsigned char* to = o.values + (((long long)at.batch * o.seqlen + at.row) * o.heads + at.head) * HEAD_DIM + lane * RUN;
#pragma unroll
      for (int i = 0; i < ELEMENTS; i += RUN) {
        u32 packed[RUN / 4];
#pragma unroll
        for (int j = 0; j < RUN / 4; ++j) {
          const float* y = x + i + 4 * j;
          packed[j] = pack_e4m3(y[0] * inverse, y[1] * inverse, y[2] * inverse, y[3] * inverse);
        }
        if constexpr (RUN == 8)
          *(uint2*)(to + i * LANES) = {packed[0], packed[1]};
        else
          *(uint4*)(to + i * LANES) = {packed[0], packed[1], packed[2], packed[3]};
      }
      if (threadIdx.x % (32 * warps) == 0)
        o.descale[((long long)at.batch * o.heads + at.head) * o.blocks + (u32)at.row / (u32)o.block] = step;
    }
  }
}
