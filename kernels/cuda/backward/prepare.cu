// Before the main kernel: delta = rowsum(dO O) - dLSE of each query, LSE in base 2, and dQ's sums and all counters cleared.
// Rows that are not there or see no key get LSE +inf, hence P = 0. A CTA has one block of BLOCK_M queries of one head.
// Chosen at compile time: HEAD_DIM, BLOCK_M, BF16, HAS_DLSE.
#include "narrow.cuh"

struct Rows {  // (batch, heads, rows) by strides in elements
  const void* data;
  long long batch, head, row;
};
struct Given {
  Rows o, dO, lse, dlse;
  float *lse2, *delta;
  float4* sums;            // of the first `ring` heads
  float4* key_sums;        // and of split tiles
  int *added, *finished;   // (batch, heads)
  int* key_added;          // (split)
  int2* counters;
  int* turns;              // (batch, heads, m_tiles, ADDERS), or null
  int heads, seqlen_q, m_tiles, ring, split;
#if BLOCK_M % 64
  float scale;
#endif
};
// Whether the main kernel begins S with -LSE / scale and dP with -delta, and finds them so.
constexpr bool BEGUN = BLOCK_M % 64 != 0;

constexpr int THREADS = 256;
constexpr int ADDERS = HEAD_DIM == 256 ? 8 : 2;  // of a block's dQ: warps, or warpgroups
constexpr int LANES = HEAD_DIM / 8;  // of a row, 16 bytes each
constexpr int TOGETHER = THREADS / LANES;

__device__ __forceinline__ const char* row_of(const Rows& x, int batch, int head, int row, int bytes) {
  return (const char*)x.data + (batch * x.batch + head * x.head + row * x.row) * bytes;
}

__device__ __forceinline__ void clear(float4* sums) {
#pragma unroll
  for (int i = threadIdx.x; i < BLOCK_M * HEAD_DIM / 4; i += THREADS) sums[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
}

extern "C" __global__ void __launch_bounds__(THREADS) attention_prepare(const __grid_constant__ Given given) {
  const int m = blockIdx.x % given.m_tiles, flat = blockIdx.x / given.m_tiles, head = flat % given.heads, batch = flat / given.heads;
  const int lane = threadIdx.x % LANES;
  const long long index = blockIdx.x;
#pragma unroll
  for (int first = 0; first < BLOCK_M; first += TOGETHER) {
    const int at = first + threadIdx.x / LANES, row = m * BLOCK_M + at;
    const bool there = at < BLOCK_M && row < given.seqlen_q;
    float sum = 0.0f;
    if (there) {
      const uint4 o = __ldg((const uint4*)row_of(given.o, batch, head, row, 2) + lane);
      const uint4 dO = __ldg((const uint4*)row_of(given.dO, batch, head, row, 2) + lane);
      const u32 x[4] = {o.x, o.y, o.z, o.w}, y[4] = {dO.x, dO.y, dO.z, dO.w};
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 a = unpack<BF16>(x[i]), b = unpack<BF16>(y[i]);
        sum = __fmaf_rn(a.x, b.x, __fmaf_rn(a.y, b.y, sum));
      }
    }
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, step);
    if (lane == 0 && at < BLOCK_M) {
      float lse2 = __int_as_float(0x7f800000);
      if (there) {
        const float lse = *(const float*)row_of(given.lse, batch, head, row, 4);
        if (lse != -lse2) lse2 = lse * (BEGUN ? 1.0f : 1.4426950408889634f);
        if constexpr (HAS_DLSE) sum -= *(const float*)row_of(given.dlse, batch, head, row, 4);
      }
      // Of every 16 queries lane q of a quad reads 2 q, 2 q + 1 and 8 more, at once.
      const long long to = index * BLOCK_M + at / 16 * 16 + at % 8 / 2 * 4 + at / 8 % 2 * 2 + at % 2;
#if BLOCK_M % 64
      lse2 = -lse2 / given.scale;
#endif
      given.lse2[to] = lse2;
      given.delta[to] = BEGUN ? -sum : sum;
    }
  }
  if (threadIdx.x == 0) {
    if (m == 0) given.added[flat] = 0, given.finished[flat] = 0;
    if (index == 0) *given.counters = make_int2(0, 0);
  }
  if (given.turns && threadIdx.x < ADDERS) given.turns[index * ADDERS + threadIdx.x] = 0;
  if (flat < given.ring) clear(given.sums + index * (BLOCK_M * HEAD_DIM / 4));
  // dV and dK of split tiles, 128 keys each.
  if constexpr (256 % BLOCK_M == 0) {
    for (int block = blockIdx.x; block < given.split * (2 * 128 / BLOCK_M); block += gridDim.x) {
      clear(given.key_sums + (long long)block * (BLOCK_M * HEAD_DIM / 4));
      if (threadIdx.x == 0 && block < given.split) given.key_added[block] = 0;
    }
  } else {
    for (long long i = index * THREADS + threadIdx.x; i < given.split * (2 * 128 * HEAD_DIM / 4); i += gridDim.x * THREADS)
      given.key_sums[i] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
    for (long long i = index * THREADS + threadIdx.x; i < given.split; i += gridDim.x * THREADS) given.key_added[i] = 0;
  }
}
