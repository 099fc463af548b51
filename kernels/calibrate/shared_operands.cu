// Each of one to three warpgroups repeats a GEMM, or two one behind the other, and waits for them (shared_operands.py).
template <int N1, int STEPS1, Operand FROM1, int N2, int STEPS2, Operand FROM2, int IDLE>
__device__ __forceinline__ void turns(u64* out, long long reps) {
  extern __shared__ __align__(1024) unsigned char smem[];
  fill_normal(smem, GEMM_SMEM_BYTES, blockIdx.x * 7919u);
  __syncthreads();
  const int warpgroup = threadIdx.x / 128;
  Accumulator<N1> c;
  Accumulator<N2> d;
  Fragments f;
  c.clear();
  d.clear();
  f.load(smem);
  const u64 a = a_descriptor(smem, warpgroup), b1 = b_descriptor<N1, FROM1>(smem), b2 = b_descriptor<N2, FROM2>(smem);
  u64 start = clock_wide();
#pragma unroll 1
  for (long long i = 0; i < reps; ++i) {
    if (i == reps / 4) start = clock_wide();
    issue_gemm<N1, STEPS1, FROM1, false>(c, f, a, b1, 1, nullptr);
    if (STEPS2 > 0) issue_gemm<N2, STEPS2, FROM2, false>(d, f, a, b2, 1, nullptr);
    wgmma_wait<0>();
    if (IDLE > 0) for (u64 since = clock_wide(); clock_wide() - since < (u64)IDLE;) {}
  }
  const u64 end = clock_wide();
  if (c.sum() + d.sum() == 1.2345f) out[0] = 1;
  if (threadIdx.x % 128 == 0) {
    u64* slot = out + 2 * (blockIdx.x * (blockDim.x / 128) + warpgroup);
    slot[0] = start;
    slot[1] = end;
  }
}
#define TURNS(NAME, THREADS, N1, STEPS1, FROM1, N2, STEPS2, FROM2, IDLE)                                              \
  extern "C" __global__ void __launch_bounds__(THREADS, 1) NAME(u64* out, long long reps) {                      \
    turns<N1, STEPS1, FROM1, N2, STEPS2, FROM2, IDLE>(out, reps);                                            \
  }
