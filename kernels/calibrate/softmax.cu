// Softmax alone: every warpgroup of the CTA repeats the step; the clock brackets the whole loop.
template <int N, int D, int PHASES>
__device__ __forceinline__ void repeat_softmax(u64* out, long long reps, float scale) {
  OnlineSoftmax<N, D, PHASES> tile;
  tile.start(threadIdx.x + blockIdx.x * 131u);
  for (int i = 0; i < 8; ++i) tile.step(scale);
  __syncthreads();
  u64 start = clock_wide();
#pragma unroll 1
  for (int i = 0; i < reps; ++i) tile.step(scale);
  float kept = tile.total();
  u64 stop = clock_wide();
  if (kept == 1.2345f) out[0] = 1;
  if (threadIdx.x % 32 == 0) out[(long long)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32] = stop - start;
}
#define SOFTMAX(NAME, WGS, N, D, PHASES)                                                                       \
  extern "C" __global__ void __launch_bounds__(WGS * 128, 1) NAME(u64* out, long long reps, long long scale) { \
    repeat_softmax<N, D, PHASES>(out, reps, __int_as_float((int)scale));                                       \
  }
