// The first SOFTMAXES warpgroups repeat softmax `reps` times; GEMMS more keep the tensor cores busy and outlast them: with one
// there is a wait after each GEMM of 512 cycles, with two none. out: (CTA, warp, [cycles, units]).
template <int N, int SOFTMAXES, int GEMMS> __device__ __forceinline__ void running(u64* out, long long reps) {
  extern __shared__ __align__(1024) unsigned char smem[];
  __shared__ volatile u32 finished[4];
  fill_normal(smem, GEMM_SMEM_BYTES, blockIdx.x * 7919u);
  const int wg = threadIdx.x / 128;
  if (threadIdx.x < 4) finished[threadIdx.x] = 0;
  __syncthreads();
  u64 start = clock_wide(), end = start;
  long long done = 0;
  float keep = 0.0f;
  if (wg < SOFTMAXES) {
    RunningSoftmax<N> tile;
    tile.start(threadIdx.x);
    float scale = 0.18f + (float)reps * 1e-9f;
    start = clock_wide();
#pragma unroll 1
    for (long long i = 0; i < reps; ++i) tile.step(scale);
    end = clock_wide();
    done = reps;
    keep = tile.total();
    finished[wg] = 1;
  } else {
    Accumulator<128> c;
    Fragments f;
    c.clear();
    u64 a = a_descriptor(smem, wg % 3), b = b_descriptor<128, SS>(smem);
    for (long long i = 0; i < 3 * reps; ++i) {
      issue_gemm<128, 8, SS, false>(c, f, a, b, 1, nullptr);
      wgmma_wait<0>();
      if (SOFTMAXES == 0 || !finished[0]) { ++done; end = clock_wide(); }
    }
    keep = c.sum();
  }
  if (threadIdx.x % 32 == 0) {
    u64* slot = out + 2 * ((long long)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32);
    slot[0] = end - start;
    slot[1] = done;
  }
  if (keep == 1.2345f) out[0] = 1;
}
#define RUNNING(N, SOFTMAXES, GEMMS)                                                                                            \
  extern "C" __global__ void __launch_bounds__((SOFTMAXES + GEMMS) * 128, 1) running_n##N##_##SOFTMAXES##_##GEMMS(u64* out, long long reps) { \
    running<N, SOFTMAXES, GEMMS>(out, reps);                                                                                    \
  }
