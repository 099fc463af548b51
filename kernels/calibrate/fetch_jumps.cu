// A run of short pieces of FFMA with a branch over 2 KiB of other code behind each, after other code has passed through the
// instruction caches (fetch_jumps.py).
constexpr int CHAINS = 8, PIECE = 512, JUMPS = 10, OVER = 128;

#define RUN8 \
  asm volatile("fma.rn.ftz.f32 %0, %0, %8, %9; fma.rn.ftz.f32 %1, %1, %8, %9; fma.rn.ftz.f32 %2, %2, %8, %9; fma.rn.ftz.f32 %3, %3, %8, %9;" \
               "fma.rn.ftz.f32 %4, %4, %8, %9; fma.rn.ftz.f32 %5, %5, %8, %9; fma.rn.ftz.f32 %6, %6, %8, %9; fma.rn.ftz.f32 %7, %7, %8, %9;" \
               : "+f"(x[0]), "+f"(x[1]), "+f"(x[2]), "+f"(x[3]), "+f"(x[4]), "+f"(x[5]), "+f"(x[6]), "+f"(x[7]) : "f"(a), "f"(b))

template <int COUNT> __device__ __forceinline__ void run(float (&x)[CHAINS], float a, float b) {
#pragma unroll
  for (int i = 0; i < COUNT / CHAINS; ++i) RUN8;
}

// `never` is 0 and the compiler does not know it. Warpgroup 1 begins `delay` cycles behind warpgroup 0.
template <int LENGTH> __device__ __forceinline__ void jumps(u32* out, int reps, int pieces, int delay, int never) {
  float x[CHAINS], a = 0.5f, b = (float)reps;
  for (int c = 0; c < CHAINS; ++c) x[c] = (float)(threadIdx.x + c);
#pragma unroll 1
  for (int rep = 0; rep < reps; ++rep) {
    if (pieces > 0) {
#pragma unroll
      for (int p = 0; p < 8; ++p) {
        if (p >= pieces) break;
        run<PIECE>(x, a, b);
      }
    }
    __syncthreads();
    u32 target = clock_now() + 400 + (threadIdx.x >= 128 ? delay : 0);
    while ((int)(clock_now() - target) < 0) {}
    u32 start = clock_now();
#pragma unroll
    for (int j = 0; j < JUMPS; ++j) {
      run<LENGTH>(x, a, b);
      if (never) {
        run<OVER>(x, a, b);
        out[threadIdx.x + j] = 1;
      }
    }
    u32 stop = clock_now();
    if (threadIdx.x % 32 == 0) out[((long long)rep * gridDim.x + blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32] = stop - start;
  }
  float total = 0.0f;
  for (int c = 0; c < CHAINS; ++c) total += x[c];
  if (total == 1.2345f) out[0] = 1;
}

#define JUMPS_KERNEL(LENGTH)                                                                                                   \
  extern "C" __global__ void __launch_bounds__(256, 1) jumps_##LENGTH(u32* out, long long reps, long long pieces, long long delay, \
                                                                      long long never) {                                      \
    jumps<LENGTH>(out, (int)reps, (int)pieces, (int)delay, (int)never);                                                       \
  }
JUMPS_KERNEL(8)
JUMPS_KERNEL(16)
JUMPS_KERNEL(32)
JUMPS_KERNEL(64)
