// One warpgroup's GEMM as a chain of wgmma k-steps: the unit of work that the tensor-core benchmarks time.
// Shared memory: three A tiles of 64 x 128 fp16 (one per warpgroup), then one B region of 88 KiB.
constexpr int A_TILE_BYTES = 64 * 128 * 2;
constexpr int B_OFFSET = 3 * A_TILE_BYTES;
constexpr int GEMM_SMEM_BYTES = B_OFFSET + 88 * 1024;
constexpr int KV_ROWS = 176;
enum Operand { SS, RS };

template <int N> struct Accumulator {
  float d[N / 2];
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) d[i] = 0.0f;
  }
  __device__ __forceinline__ float sum() {
    float total = 0.0f;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) total += d[i];
    return total;
  }
};

// A in registers: up to 12 k-steps of four fp16 pairs of random normal data.
struct Fragments {
  u32 a[48];
  __device__ __forceinline__ void load(const unsigned char* smem) {
#pragma unroll
    for (int i = 0; i < 48; ++i) a[i] = ((const volatile u32*)smem)[(threadIdx.x + i * 128) & 4095];
  }
};

// Issue STEPS k16 steps and commit them as one group. With STAMP, note the clock after each issue.
template <int N, int STEPS, Operand FROM, bool STAMP>
__device__ __forceinline__ void issue_gemm(Accumulator<N>& c, const Fragments& f, u64 a, u64 b, int accumulate, u32* stamps) {
  wgmma_fence();
#pragma unroll
  for (int s = 0; s < STEPS; ++s) {
    if (FROM == SS) {  // K-major: four steps of 32 bytes within a 128-byte row, then the next panel
      int k = s % 8;
      Wgmma<N>::ss(c.d, a + (k / 4) * (64 * 128 / 16) + (k % 4) * 2, b + (k / 4) * (N * 128 / 16) + (k % 4) * 2, s ? 1 : accumulate);
    } else {           // MN-major: a step is 16 rows of 128 bytes
      int k = s % 11;
      Wgmma<N>::rs(c.d, f.a + 4 * k, b + k * (16 * 128 / 16), s ? 1 : accumulate);
    }
    if (STAMP) stamps[s] = clock_now();
  }
  wgmma_commit();
}

template <int N, Operand FROM> __device__ __forceinline__ u64 b_descriptor(const unsigned char* smem) {
  return FROM == SS ? descriptor(smem + B_OFFSET, 16, 1024) : descriptor(smem + B_OFFSET, KV_ROWS * 128, 1024);
}
__device__ __forceinline__ u64 a_descriptor(const unsigned char* smem, int warpgroup) {
  return descriptor(smem + warpgroup * A_TILE_BYTES, 16, 1024);
}
