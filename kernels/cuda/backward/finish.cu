// After the main kernel: dQ = softmax_scale times its fp32 sums, in 16 bits and in the order of rows.
// The sums lie as the main kernel's registers do (gradients.cuh, put_queries). A CTA has one block of BLOCK_M queries of one head.
// Chosen at compile time: HEAD_DIM, BLOCK_M, BF16.
#include "narrow.cuh"

struct Given {
  const float4* sums;
  uint4* dQ;  // (batch, seqlen_q, heads, HEAD_DIM), contiguous
  int heads, seqlen_q, m_tiles;
  float scale;
};

constexpr int WARPGROUP = 128, THREADS = 2 * WARPGROUP;
constexpr int LANES = HEAD_DIM / 8;                      // of a row, 16 bytes each
constexpr int PITCH = HEAD_DIM * 2 + 16;                 // bytes of a row in shared memory
constexpr int GROUPS = BLOCK_M * HEAD_DIM / THREADS / 4;  // of four sums of a thread
constexpr bool TRANSPOSED_DQ = HEAD_DIM == 128;

extern "C" __global__ void __launch_bounds__(THREADS) attention_finish(const __grid_constant__ Given given) {
  __shared__ __align__(16) unsigned char rows[BLOCK_M * PITCH];
  const int m = blockIdx.x % given.m_tiles, flat = blockIdx.x / given.m_tiles, head = flat % given.heads, batch = flat / given.heads;
  const int rank = threadIdx.x / WARPGROUP, thread = threadIdx.x % WARPGROUP, warp = thread / 32, lane = thread % 32;
  const float4* sums = given.sums + ((long long)blockIdx.x * 2 + rank) * (GROUPS * WARPGROUP) + thread;
  float4 x[GROUPS];
#pragma unroll
  for (int g = 0; g < GROUPS; ++g) x[g] = __ldcs(sums + g * WARPGROUP);
  const float scale = given.scale;
#pragma unroll
  for (int g = 0; g < GROUPS; g += 2) {
    u32 pairs[4];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      pairs[2 * i] = pack<BF16>(x[g + i].x * scale, x[g + i].y * scale);
      pairs[2 * i + 1] = pack<BF16>(x[g + i].z * scale, x[g + i].w * scale);
    }
    if constexpr (TRANSPOSED_DQ) {  // a fragment's rows are 16 of the head dim, its columns queries
      const u32 to = smem_address(rows) + (8 * g + lane / 16 * 8 + lane % 8) * PITCH + (rank * 64 + warp * 16 + lane / 8 % 2 * 8) * 2;
      store_transposed(to, pairs[0], pairs[1], pairs[2], pairs[3]);
    } else {
      const u32 to = smem_address(rows) + (rank * 64 + warp * 16 + lane % 16) * PITCH + (8 * g + lane / 16 * 8) * 2;
      store_matrices(to, pairs[0], pairs[1], pairs[2], pairs[3]);
    }
  }
  __syncthreads();
#pragma unroll
  for (int i = threadIdx.x; i < BLOCK_M * LANES; i += THREADS) {
    const int row = m * BLOCK_M + i / LANES;
    if (row >= given.seqlen_q) break;
    given.dQ[((long long)(batch * (long long)given.seqlen_q + row) * given.heads + head) * LANES + i % LANES] =
        *(const uint4*)(rows + i / LANES * PITCH + i % LANES * 16);
  }
}
