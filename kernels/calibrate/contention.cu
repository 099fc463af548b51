// Warpgroup 0 repeats its own work `reps` times; the others repeat theirs three times as often, so that they outlast it,
// and count what they finished before it ended. (Every warp runs a fixed count: wgmma needs all four warps of a group.)
enum Role { SOFTMAX_TILE, QK_GEMM, PV_GEMM, SMEM_READ, FFMA_ONLY, EXP_ONLY };
constexpr int FLAG_OFFSET = GEMM_SMEM_BYTES;

struct Work {
  volatile u32* stop;
  unsigned char* smem;
  u64* out;
  int warpgroup;
  long long reps;

  // Runs `body` and records the cycles and count of the units finished while warpgroup 0 was at work.
  template <class Body> __device__ __forceinline__ void run(Body body) {
    long long done = 0, count = warpgroup == 0 ? reps : 3 * reps;
    __syncthreads();
    u64 start = clock_wide(), end = start;
#pragma unroll 1
    for (long long i = 0; i < count; ++i) {
      body();
      if (*stop == 0) { ++done; end = clock_wide(); }
    }
    if (warpgroup == 0) *stop = 1;
    if (threadIdx.x % 32 == 0) {
      u64* slot = out + 2 * ((long long)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32);
      slot[0] = end - start;
      slot[1] = done;
    }
  }
};

template <Role ROLE, int N> __device__ __forceinline__ float work(Work w) {
  float scale = 0.18f + (float)w.reps * 1e-9f;
  if (ROLE == SOFTMAX_TILE || ROLE == EXP_ONLY) {
    OnlineSoftmax<N, 128, ROLE == EXP_ONLY ? EXP : ALL> tile;
    tile.start(threadIdx.x);
    w.run([&] { tile.step(scale); });
    return tile.total();
  } else if (ROLE == FFMA_ONLY) {
    float x[16];
#pragma unroll
    for (int i = 0; i < 16; ++i) x[i] = (float)(threadIdx.x + i);
    w.run([&] {
#pragma unroll
      for (int k = 0; k < 512; ++k) x[k % 16] = x[k % 16] * scale + 0.5f;
    });
    float t = 0.0f;
    for (int i = 0; i < 16; ++i) t += x[i];
    return t;
  } else if (ROLE == SMEM_READ) {
    u32 t = 0;
    const u32 base = smem_address(w.smem + B_OFFSET) + (threadIdx.x % 128) * 16;
    w.run([&] {
#pragma unroll
      for (int k = 0; k < 32; ++k) {
        u32 x, y, z, v;
        asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x), "=r"(y), "=r"(z), "=r"(v) : "r"(base + k * 2048));
        t ^= x ^ y ^ z ^ v;
      }
    });
    return __uint_as_float(t);
  } else {
    constexpr Operand FROM = ROLE == QK_GEMM ? SS : RS;
    constexpr int WIDTH = ROLE == QK_GEMM ? N : 128, STEPS = ROLE == QK_GEMM ? 8 : N / 16;
    Accumulator<WIDTH> c;
    Fragments f;
    c.clear();
    if (FROM == RS) f.load(w.smem);
    u64 a = a_descriptor(w.smem, w.warpgroup), b = b_descriptor<WIDTH, FROM>(w.smem);
    w.run([&] {
      issue_gemm<WIDTH, STEPS, FROM, false>(c, f, a, b, 1, nullptr);
      wgmma_wait<0>();
    });
    return c.sum();
  }
}

#define CONTEND(NAME, WGS, N, ROLE0, ROLE1, ROLE2)                                                  \
  extern "C" __global__ void __launch_bounds__(WGS * 128, 1) NAME(u64* out, long long reps) {       \
    extern __shared__ __align__(1024) unsigned char smem[];                                         \
    fill_normal(smem, GEMM_SMEM_BYTES, blockIdx.x * 7919u);                                         \
    Work w{(volatile u32*)(smem + FLAG_OFFSET), smem, out, (int)threadIdx.x / 128, reps};           \
    if (threadIdx.x == 0) *w.stop = 0;                                                              \
    __syncthreads();                                                                                \
    float keep;                                                                                     \
    if (w.warpgroup == 0) keep = work<ROLE0, N>(w);                                                 \
    else if (w.warpgroup == 1) keep = work<ROLE1, N>(w);                                            \
    else keep = work<ROLE2, N>(w);                                                                  \
    if (keep == 1.2345f) out[0] = 1;                                                                \
  }
