// Stamps and throughput of wgmma with one, two or three warpgroups on an SM.
constexpr int SLOTS = 40;  // stamps of one GEMM: start, each k-step, committed, waited

template <int N, int STEPS, Operand FROM, bool STAMP>
__device__ __forceinline__ float timed_gemm(u32* out, const unsigned char* smem, int warpgroup, long long delay, int reps, long long row) {
  Accumulator<N> c;
  Fragments f;
  c.clear();
  if (FROM == RS) f.load(smem);
  u64 a = a_descriptor(smem, warpgroup), b = b_descriptor<N, FROM>(smem);
  u32 stamps[STEPS];
  for (int rep = 0; rep < reps; ++rep) {
    __syncthreads();
    u32 target = clock_now() + 200 + (u32)delay;
    while ((int)(clock_now() - target) < 0) {}
    u32 start = clock_now();
    issue_gemm<N, STEPS, FROM, STAMP>(c, f, a, b, 0, stamps);
    u32 committed = clock_now();
    wgmma_wait<0>();
    u32 waited = clock_now();
    if (threadIdx.x % 32 == 0) {
      u32* slot = out + (row + (long long)rep * gridDim.x * (blockDim.x / 32)) * SLOTS;
      slot[0] = start;
      if (STAMP) {
#pragma unroll
        for (int s = 0; s < STEPS; ++s) slot[1 + s] = stamps[s];
      }
      slot[SLOTS - 2] = committed;
      slot[SLOTS - 1] = waited;
    }
  }
  return c.sum();
}

// Back to back: `reps` GEMMs, waiting for each (DEPTH 0) or leaving DEPTH in flight.
template <int N, int STEPS, Operand FROM, int DEPTH>
__device__ __forceinline__ float stream_gemm(u64* out, const unsigned char* smem, int warpgroup, int reps) {
  Accumulator<N> c;
  Fragments f;
  c.clear();
  if (FROM == RS) f.load(smem);
  u64 a = a_descriptor(smem, warpgroup), b = b_descriptor<N, FROM>(smem);
  __syncthreads();
  u64 start = clock_wide();
  for (int rep = 0; rep < reps; ++rep) {
    issue_gemm<N, STEPS, FROM, false>(c, f, a, b, 1, nullptr);  // accumulate: ptxas drops a result that is overwritten
    wgmma_wait<DEPTH>();
  }
  wgmma_wait<0>();
  u64 stop = clock_wide();
  if (threadIdx.x % 32 == 0) {
    long long warp = (long long)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;
    out[2 * warp] = start;
    out[2 * warp + 1] = stop;
  }
  return c.sum();
}

#define BEGIN                                                                    \
  extern __shared__ __align__(1024) unsigned char smem[];                        \
  fill_normal(smem, GEMM_SMEM_BYTES, blockIdx.x * 7919u);                        \
  int wg = threadIdx.x / 128;                                                    \
  float keep = 0.0f;
#define END if (keep == 1.2345f) ((volatile float*)out)[0] = keep;

// delays: cycles by which warpgroups 1 and 2 start after warpgroup 0
#define STAMPED(NAME, WGS, ROLE0, ROLE1, ROLE2)                                                                             \
  extern "C" __global__ void __launch_bounds__(WGS * 128, 1) NAME(u32* out, long long delay1, long long delay2, long long reps) { \
    BEGIN                                                                                                                   \
    long long row = (long long)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32;                                          \
    if (wg == 0) keep = timed_gemm<ROLE0>(out, smem, 0, 0, reps, row);                                                      \
    else if (wg == 1) keep = timed_gemm<ROLE1>(out, smem, 1, delay1, reps, row);                                            \
    else keep = timed_gemm<ROLE2>(out, smem, 2, delay2, reps, row);                                                         \
    END                                                                                                                     \
  }
#define STREAMED(NAME, WGS, ROLE0, ROLE1, ROLE2)                                                    \
  extern "C" __global__ void __launch_bounds__(WGS * 128, 1) NAME(u64* out, long long reps) {       \
    BEGIN                                                                                           \
    if (wg == 0) keep = stream_gemm<ROLE0>(out, smem, 0, reps);                                     \
    else if (wg == 1) keep = stream_gemm<ROLE1>(out, smem, 1, reps);                                \
    else keep = stream_gemm<ROLE2>(out, smem, 2, reps);                                             \
    END                                                                                             \
  }
