// What a branch costs that is taken: straight runs of FFMA with a branch over other FFMA between them, in a loop; the same in
// chains of dependent FFMA beside other warps' running softmax.
constexpr int CHAINS = 8;

#define RUN8 \
  asm volatile("fma.rn.ftz.f32 %0, %0, %8, %9; fma.rn.ftz.f32 %1, %1, %8, %9; fma.rn.ftz.f32 %2, %2, %8, %9; fma.rn.ftz.f32 %3, %3, %8, %9;" \
               "fma.rn.ftz.f32 %4, %4, %8, %9; fma.rn.ftz.f32 %5, %5, %8, %9; fma.rn.ftz.f32 %6, %6, %8, %9; fma.rn.ftz.f32 %7, %7, %8, %9;" \
               : "+f"(x[0]), "+f"(x[1]), "+f"(x[2]), "+f"(x[3]), "+f"(x[4]), "+f"(x[5]), "+f"(x[6]), "+f"(x[7]) : "f"(a), "f"(b));

template <int COUNT> __device__ __forceinline__ void run(float (&x)[CHAINS], float a, float b) {
#pragma unroll
  for (int i = 0; i < COUNT / CHAINS; ++i) { RUN8 }
}

// `never` is 0, which the compiler does not know.
template <int BRANCHES, int SKIPPED> __device__ __forceinline__ void branches(u32* out, int reps, int never) {
  float x[CHAINS], a = 0.5f, b = (float)reps;
  for (int c = 0; c < CHAINS; ++c) x[c] = (float)(threadIdx.x + c);
  __syncthreads();
  u32 begin = clock_now();
#pragma unroll 1
  for (int rep = 0; rep < reps; ++rep) {
#pragma unroll
    for (int k = 0; k < BRANCHES; ++k) {
      run<384 / BRANCHES>(x, a, b);
      if (SKIPPED && never > k) run<SKIPPED>(x, a, b);
    }
  }
  u32 end = clock_now();
  if (threadIdx.x % 32 == 0) out[blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32] = end - begin;
  float total = 0.0f;
  for (int c = 0; c < CHAINS; ++c) total += x[c];
  if (total == 1.2345f) out[0] = 1;
}
#define BRANCHES(COUNT, SKIPPED)                                                                                              \
  extern "C" __global__ void __launch_bounds__(384, 1) branches_##COUNT##_##SKIPPED(u32* out, long long reps, long long never) { \
    branches<COUNT, SKIPPED>(out, (int)reps, (int)never);                                                                     \
  }

// Warpgroup 0: in a loop BRANCHES times 16 dependent FFMA and a branch over SKIPPED others. SOFTMAXES more: softmax, until it is done.
template <int BRANCHES, int SKIPPED, int SOFTMAXES> __device__ __forceinline__ void beside(u32* out, int reps, int never) {
  __shared__ volatile u32 finished;
  if (threadIdx.x == 0) finished = 0;
  __syncthreads();
  float total = 0.0f;
  if (threadIdx.x < 128) {
    float x[CHAINS], a = 0.5f, b = (float)reps;
    for (int c = 0; c < CHAINS; ++c) x[c] = (float)(threadIdx.x + c);
    u32 begin = clock_now();
#pragma unroll 1
    for (int rep = 0; rep < reps; ++rep) {
#pragma unroll
      for (int k = 0; k < BRANCHES; ++k) {
#pragma unroll
        for (int i = 0; i < 16; ++i) asm volatile("fma.rn.ftz.f32 %0, %0, %1, %2;" : "+f"(x[0]) : "f"(a), "f"(b));
        if (SKIPPED && never > k) run<SKIPPED>(x, a, b);
      }
    }
    u32 end = clock_now();
    if (threadIdx.x % 32 == 0) out[blockIdx.x * 4 + threadIdx.x / 32] = end - begin;
    finished = 1;
    for (int c = 0; c < CHAINS; ++c) total += x[c];
  } else {
    RunningSoftmax<96> tile;
    tile.start(threadIdx.x);
    const float scale = 0.18f + (float)reps * 1e-9f;
    while (!finished) tile.step(scale);
    total = tile.total();
  }
  if (total == 1.2345f) out[0] = 1;
}
#define BESIDE(COUNT, SKIPPED, SOFTMAXES)                                                                                     \
  extern "C" __global__ void __launch_bounds__((SOFTMAXES + 1) * 128, 1)                                                      \
  beside_##COUNT##_##SKIPPED##_##SOFTMAXES(u32* out, long long reps, long long never) {                                       \
    beside<COUNT, SKIPPED, SOFTMAXES>(out, (int)reps, (int)never);                                                            \
  }
