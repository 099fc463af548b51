// Arithmetic in warpgroups 0 and 3 beside the GEMMs of 1 and 2: what two warps of a sub-partition cost each other (two_warps.py).

template <class First, class Second>
__device__ __forceinline__ void contended(u64* out, long long reps, long long gemms, int two, First first, Second second) {
  extern __shared__ __align__(1024) unsigned char smem[];
  volatile u32* stop = (volatile u32*)(smem + GEMM_SMEM_BYTES);
  fill_normal(smem, GEMM_SMEM_BYTES, blockIdx.x * 7919u);
  if (threadIdx.x == 0) *stop = 0;
  __syncthreads();
  int wg = threadIdx.x / 128;
  long long done = 0;
  float keep = 0.0f;
  u64 start = clock_wide(), end = start;
  if (wg == 0 || wg == 3) {
    while (clock_wide() - start < 4000) {}  // let the queue fill
    start = clock_wide();
    if (wg == 0) {
      keep = first(reps);
      end = clock_wide();
      *stop = 1;
      done = reps;
    } else {
      while (two && *stop == 0) {
        keep += second(8);
        if (*stop == 0) { done += 8; end = clock_wide(); }
      }
    }
  } else {
    Accumulator<128> c;
    Fragments f;
    c.clear();
    u64 a = a_descriptor(smem, wg), b = b_descriptor<128, SS>(smem);
#pragma unroll 1
    for (long long i = 0; i < gemms; ++i) {
      issue_gemm<128, 8, SS, false>(c, f, a, b, 1, nullptr);
      wgmma_wait<0>();
      if (*stop == 0) { ++done; end = clock_wide(); }
    }
    keep = c.sum();
  }
  if (keep == 1.2345f) out[0] = 1;
  if (threadIdx.x % 32 == 0) {
    u64* slot = out + 2 * ((long long)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32);
    slot[0] = end - start;
    slot[1] = done;
  }
}
