// Adding fp32 to global memory: bulk copies out of shared memory that add (cp.reduce.async.bulk), and red.global from registers.
__device__ __forceinline__ void bulk_add(float* to, const void* from, u32 bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;"
               :: "l"(to), "r"(smem_address(from)), "r"(bytes) : "memory");
}
__device__ __forceinline__ void bulk_load(void* to, const void* from, u32 bytes, u64* b) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
               :: "r"(smem_address(to)), "l"(from), "r"(bytes), "r"(smem_address(b)) : "memory");
}
template <int N> __device__ __forceinline__ void tma_wait_read_but() {
  asm volatile("cp.async.bulk.wait_group.read %0;" :: "n"(N) : "memory");
}
__device__ __forceinline__ void wait_for(u64 ns) { while (nanoseconds() < ns) {} }
__device__ __forceinline__ u64 soon() { return (nanoseconds() / 8192 + 2) * 8192; }  // all SMs begin at the same time

// Each CTA adds `count` tiles of `bytes`, from tile begins[CTA] on through `tiles`, one or two under way.
// out: (CTA, [cycles, ns]).
extern "C" __global__ void __launch_bounds__(32) bulk_adds(u64* out, const u32* begins, float* data, long long tiles, long long count,
                                                           long long bytes, long long depth) {
  extern __shared__ __align__(1024) unsigned char smem[];
  for (int i = threadIdx.x; i < bytes / 4; i += 32) ((float*)smem)[i] = 1.0f;
  fence_async();
  __syncwarp();
  if (threadIdx.x) return;
  int tile = (int)begins[blockIdx.x];
  wait_for(soon());
  u64 begin = clock_wide(), ns = nanoseconds();
  for (int i = 0; i < (int)count; ++i) {
    bulk_add(data + (long long)tile * (bytes / 4), smem, (u32)bytes);
    tma_commit();
    if (depth == 1) tma_wait_read(); else tma_wait_read_but<1>();
    if (++tile == (int)tiles) tile = 0;
  }
  tma_wait_written();
  out[2 * blockIdx.x] = clock_wide() - begin;
  out[2 * blockIdx.x + 1] = nanoseconds() - ns;
}

// One add of `bytes` alone: out: (try, [until shared memory may be reused, until it is done]).
extern "C" __global__ void __launch_bounds__(32) bulk_add_latency(u32* out, float* data, long long count, long long bytes) {
  extern __shared__ __align__(1024) unsigned char smem[];
  for (int i = threadIdx.x; i < bytes / 4; i += 32) ((float*)smem)[i] = 1.0f;
  fence_async();
  __syncwarp();
  if (threadIdx.x) return;
  for (int i = 0; i < (int)count; ++i) {
    u32 begin = clock_now();
    bulk_add(data + (long long)i * (bytes / 4), smem, (u32)bytes);
    tma_commit();
    tma_wait_read();
    u32 read = clock_now();
    tma_wait_written();
    out[2 * i] = read - begin;
    out[2 * i + 1] = clock_now() - begin;
  }
}

// Each thread adds WIDTH floats at a time; a CTA's turn is blockDim.x * WIDTH floats in a row, and it walks on through `turns`.
// out: (CTA, [cycles, ns]) of the slowest warp by atomicMax.
template <int WIDTH> __device__ __forceinline__ void red_add(float* to) {
  if constexpr (WIDTH == 1) asm volatile("red.global.add.f32 [%0], %1;" :: "l"(to), "f"(1.0f) : "memory");
  if constexpr (WIDTH == 2) asm volatile("red.global.add.v2.f32 [%0], {%1, %1};" :: "l"(to), "f"(1.0f) : "memory");
  if constexpr (WIDTH == 4) asm volatile("red.global.add.v4.f32 [%0], {%1, %1, %1, %1};" :: "l"(to), "f"(1.0f) : "memory");
}
template <int WIDTH> __device__ __forceinline__ void reds(u64* out, const u32* begins, float* data, long long turns, long long count) {
  int turn = (int)begins[blockIdx.x];
  if (threadIdx.x == 0) wait_for(soon());
  __syncthreads();
  u64 begin = clock_wide(), ns = nanoseconds();
#pragma unroll 4
  for (int i = 0; i < (int)count; ++i) {
    red_add<WIDTH>(data + ((long long)turn * blockDim.x + threadIdx.x) * WIDTH);
    if (++turn == (int)turns) turn = 0;
  }
  __threadfence();  // until they are done
  __syncthreads();
  if (threadIdx.x == 0) {
    out[2 * blockIdx.x] = clock_wide() - begin;
    out[2 * blockIdx.x + 1] = nanoseconds() - ns;
  }
}
#define REDS(WIDTH)                                                                                                       \
  extern "C" __global__ void __launch_bounds__(256) red_adds_##WIDTH(u64* out, const u32* begins, float* data, long long turns, \
                                                                     long long count) {                                   \
    reds<WIDTH>(out, begins, data, turns, count);                                                                         \
  }
REDS(1) REDS(2) REDS(4)

// Shared memory under load: two warpgroups' GEMMs keep the tensor cores full while a third loads (bulk copies in), adds (bulk
// copies out) and a fourth stores to shared memory, or adds from registers (stores 2), each if asked. out: (CTA, role, [cycles, units]): GEMMs of each warpgroup, then
// tiles loaded, tiles added, rows of 2 KiB stored or added from registers.
constexpr int PIECE = 16 * 1024;
constexpr int SLOTS_OFFSET = GEMM_SMEM_BYTES;  // two slots loaded into, one added from, one stored to
template <int N, Operand FROM>
__device__ __forceinline__ void beside(unsigned char* smem, u64* out, const unsigned char* source, float* sums, long long reps,
                                       int gemms, int loads, int adds, int stores) {
  __shared__ u64 full[2];
  __shared__ volatile u32 stop;
  fill_normal(smem, GEMM_SMEM_BYTES, blockIdx.x * 7919u);
  if (threadIdx.x == 0) {
    stop = 0;
    mbarrier_init(&full[0], 1);
    mbarrier_init(&full[1], 1);
    fence_init();
  }
  __syncthreads();
  int warpgroup = threadIdx.x / 128, warp = threadIdx.x / 32 % 4;
  unsigned char* slots = smem + SLOTS_OFFSET;
  u64* rows = out + (long long)blockIdx.x * 10;
  u64 begin = clock_wide(), end = begin;
  long long done = 0;
  if (warpgroup < 2) {
    Accumulator<N> c;
    Fragments f;
    c.clear();
    if (FROM == RS) f.load(smem);
    u64 a = a_descriptor(smem, warpgroup), b = b_descriptor<N, FROM>(smem);
    long long count = gemms ? (warpgroup == 0 ? reps : 3 * reps) : 0;
#pragma unroll 1
    for (long long i = 0; i < count; ++i) {
      issue_gemm<N, 8, FROM, false>(c, f, a, b, 1, nullptr);
      wgmma_wait<0>();
      if (stop == 0) { ++done; end = clock_wide(); }
    }
    if (!gemms && warpgroup == 0) while (clock_wide() - begin < (u64)reps * 512) {}
    if (warpgroup == 0) stop = 1;
    if (c.sum() == 1.2345f) out[0] = 1;
    if (threadIdx.x % 128 == 0) { rows[2 * warpgroup] = end - begin; rows[2 * warpgroup + 1] = done; }
  } else if (warpgroup == 2 && warp == 0 && threadIdx.x % 32 == 0 && loads) {
    const unsigned char* from = source + (long long)(blockIdx.x * 37 % 512) * PIECE;
    for (int s = 0; s < 2; ++s) { mbarrier_expect(&full[s], PIECE); bulk_load(slots + s * PIECE, from, PIECE, &full[s]); }
    while (stop == 0) {
      int s = (int)(done % 2);
      mbarrier_wait(&full[s], (u32)(done / 2 & 1));
      ++done;
      end = clock_wide();
      mbarrier_expect(&full[s], PIECE);
      bulk_load(slots + s * PIECE, from + (done % 16) * PIECE, PIECE, &full[s]);
    }
    for (int s = 0; s < 2; ++s) mbarrier_wait(&full[(done + s) % 2], (u32)((done + s) / 2 & 1));
    rows[4] = end - begin; rows[5] = done;
  } else if (warpgroup == 2 && warp == 1 && threadIdx.x % 32 == 0 && adds) {
    float* to = sums + (long long)(blockIdx.x * 37 % 512) * (PIECE / 4);
    while (stop == 0) {
      bulk_add(to + (done % 16) * (PIECE / 4), slots + 2 * PIECE, PIECE);
      tma_commit();
      tma_wait_read();
      ++done;
      end = clock_wide();
    }
    tma_wait_written();
    rows[6] = end - begin; rows[7] = done;
  } else if (warpgroup == 3 && stores == 2) {
    float* to = sums + (long long)(blockIdx.x * 37 % 512) * (PIECE / 4) + threadIdx.x % 128 * 4;
    while (stop == 0) {
#pragma unroll
      for (int k = 0; k < 8; ++k) red_add<4>(to + (done % 64 + k) * 512);
      done += 8;
      end = clock_wide();
    }
    if (threadIdx.x % 128 == 0) { rows[8] = end - begin; rows[9] = done; }
  } else if (warpgroup == 3 && stores) {
    u32 to = smem_address(slots + 3 * PIECE) + threadIdx.x % 128 * 16;
    while (stop == 0) {
#pragma unroll
      for (int k = 0; k < 8; ++k) asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" :: "r"(to + k * 2048), "r"((u32)done) : "memory");
      done += 8;
      end = clock_wide();
    }
    if (threadIdx.x % 128 == 0) { rows[8] = end - begin; rows[9] = done; }
  }
}
#define BESIDE(NAME, N, FROM)                                                                                                   \
  extern "C" __global__ void __launch_bounds__(512, 1) NAME(u64* out, const unsigned char* source, float* sums, long long reps, \
                                                            long long gemms, long long loads, long long adds, long long stores) { \
    extern __shared__ __align__(1024) unsigned char smem[];                                                                     \
    beside<N, FROM>(smem, out, source, sums, reps, (int)gemms, (int)loads, (int)adds, (int)stores);                                   \
  }
