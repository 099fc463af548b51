// A straight run of a mix of instructions, stamped on the way, after other code has passed through the instruction caches
// (fetch_mixes.py). A block of eight: FFMA; FMNMX; two exponentials with their FFMA, FADD and F2FP; or EX2.
constexpr int CHAINS = 8, PIECE = 512, STAMPS = 12;  // a piece: 512 instructions of 16 bytes
enum Mix { FFMAS, FMNMXS, WEIGHTS, EX2S };

#define ON(n, text) asm volatile(text : "+f"(x[(n + SHIFT) % CHAINS]) : "f"(a), "f"(b))
#define FMA(n) ON(n, "fma.rn.ftz.f32 %0, %0, %1, %2;")
#define ADD(n) ON(n, "add.ftz.f32 %0, %0, %1;")
#define MAX(n) ON(n, "max.ftz.f32 %0, %0, %2;")
#define MIN(n) ON(n, "min.ftz.f32 %0, %0, %1;")
#define EX2(n) ON(n, "ex2.approx.ftz.f32 %0, %0;")
#define CVT(n) ON(n, "{ .reg .b32 t; cvt.rn.f16x2.f32 t, %0, %1; mov.b32 %0, t; }")

template <int MIX, int SHIFT> __device__ __forceinline__ void eight(float (&x)[CHAINS], float a, float b) {
  if (MIX == FFMAS) { FMA(0); FMA(1); FMA(2); FMA(3); FMA(4); FMA(5); FMA(6); FMA(7); }
  if (MIX == FMNMXS && SHIFT % 2) { MAX(0); MAX(1); MAX(2); MAX(3); MAX(4); MAX(5); MAX(6); MAX(7); }
  if (MIX == FMNMXS && !(SHIFT % 2)) { MIN(0); MIN(1); MIN(2); MIN(3); MIN(4); MIN(5); MIN(6); MIN(7); }
  if (MIX == WEIGHTS) { FMA(0); EX2(1); ADD(2); FMA(3); EX2(4); ADD(5); CVT(6); ADD(7); }
  if (MIX == EX2S) { EX2(0); EX2(1); EX2(2); EX2(3); EX2(4); EX2(5); EX2(6); EX2(7); }
}
template <int MIX, int COUNT> __device__ __forceinline__ void run(float (&x)[CHAINS], float a, float b) {
  eight<MIX, 0>(x, a, b);
  if constexpr (COUNT >= 16) eight<MIX, 3>(x, a, b);
  if constexpr (COUNT >= 32) { eight<MIX, 6>(x, a, b); eight<MIX, 1>(x, a, b); }
  if constexpr (COUNT > 32) run<MIX, COUNT - 32>(x, a, b);
}

// `pieces`: of other code between two runs. Warpgroup 1 begins `delay` cycles behind warpgroup 0.
template <int MIX, int PIECES> __device__ __forceinline__ void fetch(u32* out, int reps, int pieces, int delay) {
  float x[CHAINS], a = 0.5f, b = (float)reps;
  for (int c = 0; c < CHAINS; ++c) x[c] = (float)(threadIdx.x + c);
#pragma unroll 1
  for (int rep = 0; rep < reps; ++rep) {
    if (pieces > 0) {
#pragma unroll
      for (int p = 0; p < PIECES; ++p) {
        if (p >= pieces) break;
        run<FFMAS, PIECE>(x, a, b);
      }
    }
    __syncthreads();
    u32 target = clock_now() + 400 + (threadIdx.x >= 128 ? delay : 0);
    while ((int)(clock_now() - target) < 0) {}
    u32 t[STAMPS];
    t[0] = clock_now();
    run<MIX, 8>(x, a, b);
    t[1] = clock_now();
    run<MIX, 8>(x, a, b);
    t[2] = clock_now();
    run<MIX, 16>(x, a, b);
    t[3] = clock_now();
    run<MIX, 32>(x, a, b);
    t[4] = clock_now();
    run<MIX, 64>(x, a, b);
    t[5] = clock_now();
    run<MIX, 128>(x, a, b);
    t[6] = clock_now();
    run<MIX, 256>(x, a, b);
    t[7] = clock_now();
    if (threadIdx.x % 32 == 0) {
      u32* slot = out + (((long long)rep * gridDim.x + blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32) * STAMPS;
#pragma unroll
      for (int i = 0; i < 8; ++i) slot[i] = t[i];
    }
  }
  float total = 0.0f;
  for (int c = 0; c < CHAINS; ++c) total += x[c];
  if (total == 1.2345f) out[0] = 1;
}

#define FETCH(NAME, MIX)                                                                                              \
  extern "C" __global__ void __launch_bounds__(384, 1) NAME(u32* out, long long reps, long long pieces, long long delay) { \
    fetch<MIX, 16>(out, (int)reps, (int)pieces, (int)delay);                                                          \
  }
FETCH(fetch_ffma, FFMAS)
FETCH(fetch_fmnmx, FMNMXS)
FETCH(fetch_weights, WEIGHTS)
FETCH(fetch_ex2, EX2S)
