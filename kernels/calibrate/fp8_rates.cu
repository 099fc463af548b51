// Warpgroup 0 repeats a pattern, or a stream of e4m3 GEMMs; the warpgroups after it keep the tensor cores full with e4m3 GEMMs, or
// there are none. A GEMM is STEPS x m64nNk32 into one accumulator, both operands K-major rows of 128 bytes in shared memory, or A
// in registers.
constexpr int A_BYTES = 64 * 128, B_BYTES = 256 * 128, PATTERN_BYTES = 32 * 1024;
constexpr int B_AT = 3 * A_BYTES, PATTERN_AT = B_AT + B_BYTES, STOP_AT = PATTERN_AT + PATTERN_BYTES;

__device__ __forceinline__ u64 descriptor(const void* tile) {
  return (u64)((smem_address(tile) & 0x3ffff) >> 4) | ((u64)(1024 >> 4) << 32) | (1ull << 62);
}

template <int N, int STEPS, bool A_SHARED> struct Gemm {
  float d[N / 2];
  u32 a[4];
  u64 from, b;
  __device__ __forceinline__ void start(unsigned char* smem, int warpgroup) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) d[i] = 0.0f;
#pragma unroll
    for (int i = 0; i < 4; ++i) a[i] = ((u32*)smem)[threadIdx.x + 128 * i];
    from = descriptor(smem + warpgroup * A_BYTES), b = descriptor(smem + B_AT);
  }
  __device__ __forceinline__ void issue() {
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < STEPS; ++k) {
      if constexpr (A_SHARED) Wgmma<N>::ss(d, from + k % 4 * 2, b + k % 4 * 2, 1);
      else Wgmma<N>::rs(d, a, b + k % 4 * 2, 1);
    }
    wgmma_commit();
  }
  __device__ __forceinline__ float sum() const {
    float s = 0.0f;
#pragma unroll
    for (int i = 0; i < N / 2; ++i) s += d[i];
    return s;
  }
};

template <class Rival, class Pattern> __device__ __forceinline__ void measured(u64* out, long long reps, long long gemms, Pattern pattern) {
  extern __shared__ __align__(1024) unsigned char smem[];
  volatile u32* stop = (volatile u32*)(smem + STOP_AT);
  for (int i = threadIdx.x; i < STOP_AT / 4; i += blockDim.x) ((u32*)smem)[i] = hash(i + 977 * blockIdx.x) & 0xb7b7b7b7u;  // finite e4m3
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  if (threadIdx.x == 0) *stop = 0;
  __syncthreads();
  const int warpgroup = threadIdx.x / 128;
  long long done = reps;
  float keep = 0.0f;
  u64 start = clock_wide(), end = start;
  if (warpgroup == 0) {
    while (clock_wide() - start < 4000) {}  // let the queue fill
    start = clock_wide();
    keep = pattern(smem, reps);
    end = clock_wide();
    *stop = 1;
  } else {
    Rival gemm;
    gemm.start(smem, warpgroup);
    done = 0;
#pragma unroll 1
    for (long long i = 0; i < gemms; ++i) {
      gemm.issue();
      wgmma_wait<0>();
      if (*stop == 0) ++done, end = clock_wide();  // whole warpgroups leave together: all run to the end
    }
    keep = gemm.sum();
  }
  if (keep == 1.2345f) out[0] = 1;
  if (threadIdx.x % 32 == 0) {
    u64* slot = out + 2 * ((u64)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32);
    slot[0] = end - start, slot[1] = done;
  }
}
