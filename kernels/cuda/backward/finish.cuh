// dQ's sums on their way out, under the main loop: a warp of each CTA takes the blocks of heads that every tile of keys has added to.
#pragma once
#include "shared.cuh"

__device__ __forceinline__ int draw(int* counter) {
  int number = 0;
  if (lane_id() == 0) number = atomicAdd(counter, 1);
  return __shfl_sync(0xffffffffu, number, 0);
}
// Past L1, which would keep what a head before has left there.
__device__ __forceinline__ float4 load_sums(const float4* from) {
  float4 x;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "l"(from) : "memory");
  return x;
}

constexpr int PARTS = CONSUMERS * SHARE_ROWS / 32;  // of a block's sums, each 32 rows of a share

// One warp: a part of dQ, scale times the sums in 16 bits; and zeros for the head that has them next. AT_ONCE times 1 KiB is under way.
template <int AT_ONCE> __device__ __forceinline__ void finish_part(const Params& p, int item) {
  constexpr int LANES = SHARE_COLUMNS / 8, ROWS = 32 / LANES;  // 32 bytes of sums of a lane, ROWS rows of a warp
  const int block = item / PARTS, part = item - block * PARTS, flat = block / p.m_tiles, m = block - flat * p.m_tiles;
  const bool again = flat + p.ring < p.batch * p.heads;
  const int batch = flat / p.heads, lane = lane_id(), row = lane / LANES;
  const int query = m * BLOCK_M + (DQ_BY_QUERIES ? part : part % 2) * 32 + row;
  float4* sums = reinterpret_cast<float4*>(p.sums) +
                 ((u64)(u32)(flat % p.ring * p.m_tiles + m) * PARTS + part) * (32 * SHARE_COLUMNS / 4) + lane * 2;
  const u32 pitch = (u32)p.heads * (HEAD_DIM * 2);
  // The 32 bytes of sums at number n of row r are those of number n xor r % 8; rows of odd steps are 4 further.
  unsigned char* out = static_cast<unsigned char*>(p.dQ) + ((u64)(u32)batch * (u32)p.seqlen_q + (u32)query) * pitch +
                       (u32)(flat - batch * p.heads) * (HEAD_DIM * 2) + (DQ_BY_QUERIES ? 0 : part / 2 * SHARE_COLUMNS * 2) +
                       (lane % LANES ^ row) * 16;
  int left = p.seqlen_q - query;
#pragma unroll 1
  for (int step = 0; step < 32 / ROWS; step += AT_ONCE) {
    float4 x[AT_ONCE][2];
#pragma unroll
    for (int r = 0; r < AT_ONCE; ++r) x[r][0] = load_sums(sums + r * 64), x[r][1] = load_sums(sums + r * 64 + 1);
#pragma unroll
    for (int r = 0; r < AT_ONCE; ++r) {
      const float4 low = x[r][0], high = x[r][1];
      uint4 y;
      y.x = pack<BF16>(low.x * p.scale, low.y * p.scale), y.y = pack<BF16>(low.z * p.scale, low.w * p.scale);
      y.z = pack<BF16>(high.x * p.scale, high.y * p.scale), y.w = pack<BF16>(high.z * p.scale, high.w * p.scale);
      if (again) sums[0] = sums[1] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (left > 0) *reinterpret_cast<uint4*>(out) = y;
      left -= ROWS, sums += 64, out = (unsigned char*)((u64)out ^ 64) + ROWS * pitch;
    }
  }
  __syncwarp();
  if (again && lane == 0) count(p.finished + flat);
}

// A warp of its own: part by part in the order of heads, to the end.
__device__ __forceinline__ void finish_queries(const Params& p) {
#pragma unroll 1
  for (int item = draw(&p.counters->part); item < p.batch * p.heads * p.m_tiles * PARTS; item = draw(&p.counters->part)) {
    wait_count(p.added + item / (p.m_tiles * PARTS), CONSUMERS * p.n_tiles);
    __syncwarp();
    finish_part<2>(p, item);
  }
}
// A consumer's warp between tiles: what can be finished now, and nothing is waited for.
__device__ __forceinline__ void help_finish(const Params& p) {
  const int lane = lane_id();
#pragma unroll 1
  for (int n = 0; n < 8; ++n) {
    int item = -1;
    if (lane == 0) {
      const int next = *(volatile int*)&p.counters->part;
      if (next < p.batch * p.heads * p.m_tiles * PARTS && count_of(p.added + next / (p.m_tiles * PARTS)) >= CONSUMERS * p.n_tiles) {
        asm volatile("fence.proxy.async;" ::: "memory");
        if (atomicCAS(&p.counters->part, next, next + 1) == next) item = next;
      }
    }
    item = __shfl_sync(0xffffffffu, item, 0);
    if (item < 0) break;
    finish_part<8>(p, item);
  }
}
