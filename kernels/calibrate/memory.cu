// Latency and bandwidth of L2 and HBM, by plain loads and by TMA.
constexpr int STAGE_BYTES = 16 * 1024;  // 128 rows of 64 fp16

// One dependent load at a time from `count` addresses `stride` bytes apart; records cycles of each. Runs on the SM
// `only_sm` alone, or on all if that is negative.
extern "C" __global__ void load_latency(u32* out, const unsigned char* data, long long stride, long long count,
                                        long long passes, long long only_sm) {
  __shared__ u32 sink;
  if (threadIdx.x || (only_sm >= 0 && sm_id() != only_sm)) return;
  for (long long pass = 0; pass < passes; ++pass) {
    for (long long i = 0; i < count; ++i) {
      const unsigned char* at = data + i * stride;
      u32 start = clock_now(), x;
      asm volatile("ld.global.cg.u32 %0, [%1];" : "=r"(x) : "l"(at) : "memory");
      asm volatile("st.shared.u32 [%0], %1;" :: "r"(smem_address(&sink)), "r"(x) : "memory");  // issue waits for x here
      u32 stop = clock_now();
      if (pass == passes - 1) out[(only_sm < 0 ? blockIdx.x : 0) * count + i] = stop - start;
    }
  }
}

// One TMA tile at a time: cycles from issue to the waiting thread's return, and of the issue alone.
extern "C" __global__ void tma_latency(u32* out, const void* map, long long rows, long long box_bytes, long long count, long long passes, long long prefetch) {
  extern __shared__ __align__(1024) unsigned char smem[];
  __shared__ u64 full;
  if (threadIdx.x) return;
  mbarrier_init(&full, 1);
  fence_init();
  if (prefetch) {
    asm volatile("prefetch.tensormap [%0];" :: "l"(map) : "memory");
    u32 t = clock_now();
    while (clock_now() - t < 4000) {}
  }
  u32 phase = 0;
  for (long long pass = 0; pass < passes; ++pass)
    for (long long i = 0; i < count; ++i) {
      u32 start = clock_now();
      mbarrier_expect(&full, (u32)box_bytes);
      tma_load(smem, map, &full, 0, (int)(i * rows));
      u32 issued = clock_now();
      mbarrier_wait(&full, phase);
      u32 stop = clock_now();
      phase ^= 1;
      if (pass == passes - 1) {
        out[(blockIdx.x * count + i) * 2] = issued - start;
        out[(blockIdx.x * count + i) * 2 + 1] = stop - start;
      }
    }
}

// TMA store of one tile: cycles until shared memory may be reused, and until the write is done.
extern "C" __global__ void tma_store_latency(u32* out, const void* map, long long rows, long long count) {
  extern __shared__ __align__(1024) unsigned char smem[];
  fill_normal(smem, STAGE_BYTES * 2, 1);
  if (threadIdx.x) return;
  for (long long i = 0; i < count; ++i) {
    u32 start = clock_now();
    tma_store(map, smem, 0, (int)(i * rows));
    tma_commit();
    tma_wait_read();
    u32 reusable = clock_now();
    tma_wait_written();
    u32 stop = clock_now();
    out[(blockIdx.x * count + i) * 2] = reusable - start;
    out[(blockIdx.x * count + i) * 2 + 1] = stop - start;
  }
}

// Every CTA streams tiles through a ring of stages, `passes` times over its share of the tiles.
// groups: the CTAs of one group read the same tiles in the same order; each group has its own `tiles / groups` tiles.
extern "C" __global__ void tma_stream(u64* out, const void* map, long long tiles, long long groups, long long passes, long long stages) {
  extern __shared__ __align__(1024) unsigned char smem[];
  __shared__ u64 full[16];
  if (threadIdx.x) return;
  for (int i = 0; i < stages; ++i) mbarrier_init(&full[i], 1);
  fence_init();
  int share = (int)(tiles / groups), first = (int)(blockIdx.x % groups) * share, tile = 0;
  int total = share * (int)passes, stage = 0, phase = 1;
  u64 start = clock_wide(), ns = nanoseconds();
  for (int i = 0; i < total + (int)stages; ++i) {
    if (i >= (int)stages) mbarrier_wait(&full[stage], phase);
    if (i < total) {
      mbarrier_expect(&full[stage], STAGE_BYTES);
      tma_load(smem + stage * STAGE_BYTES, map, &full[stage], 0, (first + tile) * 128);
    }
    if (++tile == share) tile = 0;
    if (++stage == (int)stages) { stage = 0; phase ^= 1; }
  }
  out[2 * blockIdx.x] = clock_wide() - start;
  out[2 * blockIdx.x + 1] = nanoseconds() - ns;
}

// Plain reads, writes or copies of disjoint slices, 16 bytes a thread, four in flight.
template <int MODE> __device__ __forceinline__ void sweep(u64* out, uint4* data, long long count) {
  u64 start = clock_wide();
  u32 t = 0;
  long long step = (long long)gridDim.x * blockDim.x;
  for (long long i = (long long)blockIdx.x * blockDim.x + threadIdx.x; i + 3 * step < count; i += 4 * step) {
    uint4 v[4];
#pragma unroll
    for (int k = 0; k < 4; ++k) v[k] = MODE == 1 ? make_uint4(t + 1, (u32)i, k, 7) : data[i + k * step];
#pragma unroll
    for (int k = 0; k < 4; ++k) {
      if (MODE == 0) t ^= v[k].x ^ v[k].y ^ v[k].z ^ v[k].w;
      else data[(MODE == 2 ? count : 0) + i + k * step] = v[k];
    }
  }
  if (MODE == 0 && t == 12345) out[0] = t;
  if (threadIdx.x == 0) out[blockIdx.x] = clock_wide() - start;
}
extern "C" __global__ void sweep_read(u64* out, uint4* data, long long count) { sweep<0>(out, data, count); }
extern "C" __global__ void sweep_write(u64* out, uint4* data, long long count) { sweep<1>(out, data, count); }
extern "C" __global__ void sweep_copy(u64* out, uint4* data, long long count) { sweep<2>(out, data, count); }
