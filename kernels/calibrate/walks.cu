// CTAs that read memory as few queries do: blocks of 32 KiB through a ring in shared memory by cp.async, mma.sync between.
constexpr int THREADS = 128, BLOCK_BYTES = 32 * 1024, VECTORS = BLOCK_BYTES / 16 / THREADS;

__device__ __forceinline__ void copy_async(u32 to, const void* from) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(from) : "memory");
}
template <int PENDING> __device__ __forceinline__ void copies_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }
__device__ __forceinline__ void copies_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

__device__ __forceinline__ void multiply(float (&d)[4], const u32 (&a)[4], u32 b0, u32 b1) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

// SLOTS blocks of the CTA's own are asked for before the first is awaited, and one more when one has been used, as a loop of so many
// buffers does. A warp does `steps` mma.sync on a block. Without `reads` nothing is read and a block takes `lasts` cycles at least.
// log: (CTA, [ns at start, ns at end, cycles, SM]).
template <int SLOTS>
__device__ __forceinline__ void walk(u64* log, float* keep, const uint4* data, const u32* fragments, int blocks, int steps, bool reads, u32 lasts) {
  extern __shared__ __align__(16) unsigned char smem[];
  const u64 begin = nanoseconds(), cycles = clock_wide();
  const uint4* from = data + (size_t)blockIdx.x * blocks * (BLOCK_BYTES / 16) + threadIdx.x;
  const u32 to = smem_address(smem) + threadIdx.x * 16;
  auto ask = [&](int block) {
    if (reads && block < blocks) {
#pragma unroll
      for (int i = 0; i < VECTORS; ++i) copy_async(to + block % SLOTS * BLOCK_BYTES + i * THREADS * 16, from + (size_t)block * (BLOCK_BYTES / 16) + i * THREADS);
    }
    copies_commit();
  };
  u32 a[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) a[i] = fragments[i * THREADS + threadIdx.x];
  float d[4][4] = {};
  u32 due = clock_now();
#pragma unroll 1
  for (int j = 0; j < SLOTS; ++j) ask(j);
#pragma unroll 1
  for (int block = 0; block < blocks; ++block) {
    copies_wait<SLOTS - 1>();
    __syncthreads();
    const u32* words = (const u32*)(smem + block % SLOTS * BLOCK_BYTES) + threadIdx.x;
#pragma unroll 1
    for (int step = 0; step < steps; step += 4) {
      const u32 b = reads ? words[step % 32 * THREADS] : fragments[(step % 4) * THREADS + threadIdx.x];
#pragma unroll
      for (int i = 0; i < 4; ++i) multiply(d[i], a, b, b ^ 0x80000000u);
    }
    due += lasts;
    while (!reads && (int)(clock_now() - due) < 0) {}
    __syncthreads();
    ask(block + SLOTS);
  }
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < 4; ++i) sum += d[i][0] + d[i][1] + d[i][2] + d[i][3];
  if (sum == 1234.5f) keep[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    u64* row = log + 4 * blockIdx.x;
    row[0] = begin; row[1] = nanoseconds(); row[2] = clock_wide() - cycles; row[3] = sm_id();
  }
}
#define WALK(SLOTS)                                                                                                                \
  extern "C" __global__ void __launch_bounds__(THREADS) walk_##SLOTS(u64* log, float* keep, const uint4* data, const u32* fragments, \
                                                                     long long blocks, long long steps, long long reads, long long lasts) { \
    walk<SLOTS>(log, keep, data, fragments, (int)blocks, (int)steps, reads != 0, (u32)lasts);                                      \
  }
WALK(2)
WALK(3)
WALK(4)
WALK(5)
WALK(6)
