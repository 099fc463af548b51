// What a CTA of the FP8 kernels is launched with: its tiles in shared memory, the descales of its operands.
#pragma once
#include "softmax_fp8.cuh"
#include "tiles.cuh"
#include "trace.cuh"

constexpr int ROWS = 64;  // of one consumer warpgroup: M of every WGMMA
constexpr int PANEL = HEAD_DIM < 128 ? HEAD_DIM : 128;  // columns, and bytes, of one swizzled row of Q, K and V
constexpr int PANELS = HEAD_DIM / PANEL;
constexpr int PANEL_STEPS = KEY_PANEL / 32;  // k steps of P V in one swizzled row, of KEY_PANEL keys, of the transposed V
constexpr int KEY_PANELS = (BLOCK_N + KEY_PANEL - 1) / KEY_PANEL;
constexpr int THREADS = WARPGROUP * (1 + CONSUMERS);
constexpr int WARP_ROWS = 16;                            // of a warpgroup's 64, one warp's in every accumulator
constexpr int STAGED = HEAD_DIM < 128 ? HEAD_DIM : 128;  // columns of O that pass through shared memory at a time
constexpr int STAGED_PANEL = 64;                         // of them in one 128-byte swizzled row
constexpr int TRANSPOSERS = 3;                           // warps
static_assert(BLOCK_M == ROWS * CONSUMERS, "one WGMMA tile of 64 queries per consumer warpgroup");
static_assert(BLOCK_N % 32 == 0, "the k step of P V is 32 keys");
static_assert(CONSUMERS <= 3, "named barriers are numbered for three consumers");

// What the CTA is launched with, 168 x 384 or 128 x 512, dealt out anew: a register more and setmaxnreg waits for ever.
constexpr int ENTRY_REGISTERS = 65536 / THREADS / 8 * 8;
constexpr int PRODUCER_REGISTERS = ENTRY_REGISTERS * (1 + CONSUMERS) - CONSUMERS * CONSUMER_REGISTERS;
static_assert(PRODUCER_REGISTERS >= 24, "setmaxnreg leaves a warp 24 registers at least");

struct Shared {
  alignas(1024) unsigned char Q[CONSUMERS][ROWS * HEAD_DIM];
  alignas(1024) unsigned char K[STAGES][BLOCK_N * HEAD_DIM];
  alignas(1024) unsigned char V[V_STAGES][BLOCK_N * HEAD_DIM];
  alignas(1024) unsigned char Vt[VT_STAGES][KEY_PANELS * KEY_PANEL * HEAD_DIM];
  alignas(1024) unsigned char O[CONSUMERS][4][WARP_ROWS * STAGED * 2];
  Ring<1> q[CONSUMERS];
  Ring<STAGES> k;
  Ring<V_STAGES> v;
  Ring<VT_STAGES> vt;
  Work work;
  Scales scales[2 * STAGES];  // of the blocks: come with K, read after its slot is free
};

// The value that an element stands for is its own times a scale in fp32. There is one for a batch entry and K/V head, or with
// BLOCK_SCALES one for 64 rows of a head of Q and for a block of a head of K or V. Null means 1.
struct Descale {
  const float* at;
  int batch_stride, head_stride;
  __device__ __forceinline__ float of(int batch, int head, int block = 0) const {
    return at == nullptr ? 1.0f : __ldg(at + (long long)batch * batch_stride + (long long)head * head_stride + block);
  }
};
struct Descales {
  Descale q, k, v;
  int together;  // blocks whose P V is added up apart, with TWO_LEVELS
};
constexpr float SMALLEST_V_SCALE = 7.888609e-31f;  // 2^-100; its inverse times a row sum is in fp32

struct Problem {
  const TensorMap &q, &k, &v, &o;
  const Params& p;
  const Descales& descales;
};

// The next number of a queue in memory, in lane 0.
__device__ __forceinline__ int draw(int* queue) {
  int number = 0;
  if (lane_id() == 0) number = atomicAdd(queue, 1);
  return number;
}
