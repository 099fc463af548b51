// Barriers between warps, launches, and the older mma.sync path.

// Warp 0 and warp 1 (or warpgroups 0 and 1) hand a token back and forth `reps` times; half a round is one hand-off.
extern "C" __global__ void mbarrier_handoff(u32* out, long long reps) {
  __shared__ u64 barrier[2];
  if (threadIdx.x == 0) { mbarrier_init(&barrier[0], 1); mbarrier_init(&barrier[1], 1); fence_init(); }
  __syncthreads();
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  u32 start = clock_now();
  for (int i = 0; i < reps; ++i) {
    if (warp == 0) {
      if (lane == 0) mbarrier_arrive(&barrier[0]);
      mbarrier_wait(&barrier[1], i & 1);
    } else {
      mbarrier_wait(&barrier[0], i & 1);
      if (lane == 0) mbarrier_arrive(&barrier[1]);
    }
    __syncwarp();
  }
  u32 stop = clock_now();
  if (threadIdx.x == 0) out[blockIdx.x] = stop - start;
}

extern "C" __global__ void named_handoff(u32* out, long long reps) {
  int wg = threadIdx.x / 128;
  __syncthreads();
  u32 start = clock_now();
  for (int i = 0; i < reps; ++i) {
    if (wg == 0) { bar_arrive(1, 256); bar_sync(2, 256); }
    else { bar_sync(1, 256); bar_arrive(2, 256); }
  }
  u32 stop = clock_now();
  if (threadIdx.x == 0) out[blockIdx.x] = stop - start;
}

// Costs on one warp: arrive, try_wait on a completed phase, and bar.sync of a whole CTA, `reps` times in a row.
extern "C" __global__ void barrier_costs(u32* out, long long reps) {
  __shared__ u64 barrier;
  if (threadIdx.x == 0) { mbarrier_init(&barrier, 1); fence_init(); }
  __syncthreads();
  u32 t0 = clock_now();
  for (int i = 0; i < reps; ++i) bar_sync(0, blockDim.x);
  u32 t1 = clock_now();
  if (threadIdx.x == 0) {
    u32 t2 = clock_now();
    for (int i = 0; i < reps; ++i) mbarrier_arrive(&barrier);
    u32 t3 = clock_now(), seen = 0;
    for (int i = 0; i < reps; ++i) seen += mbarrier_try(&barrier, (u32)(reps + 1) & 1);
    u32 t4 = clock_now();
    u32* slot = out + blockIdx.x * 4;
    slot[0] = t1 - t0; slot[1] = t3 - t2; slot[2] = t4 - t3; slot[3] = seen;
  }
}

// setmaxnreg: the producer gives registers back, two consumers take them; cycles of each.
extern "C" __global__ void __launch_bounds__(384, 1) register_split(u32* out) {
  int wg = threadIdx.x / 128;
  __syncthreads();
  u32 start = clock_now(), stop;
  if (wg == 0) { asm volatile("setmaxnreg.dec.sync.aligned.u32 24;" ::: "memory"); stop = clock_now(); }
  else { asm volatile("setmaxnreg.inc.sync.aligned.u32 240;" ::: "memory"); stop = clock_now(); }
  if (threadIdx.x % 128 == 0) out[blockIdx.x * 3 + wg] = stop - start;
}

extern "C" __global__ void empty() {}
extern "C" __global__ void __launch_bounds__(384, 1) empty_large() {}
extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1) empty_cluster() {}

// When each CTA's first and last instruction ran, on which SM; every CTA lasts about `cycles`.
__device__ __forceinline__ void stamp_cta(u64* out, long long cycles) {
  u64 start = clock_wide(), ns = nanoseconds();
  while (clock_wide() - start < cycles) {}
  __syncthreads();
  if (threadIdx.x == 0) {
    u64* slot = out + 5ll * blockIdx.x;
    slot[0] = sm_id(); slot[1] = start; slot[3] = ns;
    slot[4] = nanoseconds();
    slot[2] = clock_wide();
  }
}
extern "C" __global__ void __launch_bounds__(384, 1) cta_stamps(u64* out, long long cycles) { stamp_cta(out, cycles); }
extern "C" __global__ void __cluster_dims__(2, 1, 1) __launch_bounds__(384, 1) cluster_stamps(u64* out, long long cycles) { stamp_cta(out, cycles); }

// mma.sync m64n8k16-style: eight independent accumulators of m16n8k16 per warp, operands in registers.
extern "C" __global__ void mma_sync(u64* out, long long reps) {
  float d[8][4];
  u32 a[4], b[2];
  for (int i = 0; i < 4; ++i) a[i] = 0x3c003800u ^ (hash(threadIdx.x * 4 + i) & 0x83ff83ffu);
  for (int i = 0; i < 2; ++i) b[i] = 0x3a003b00u ^ (hash(threadIdx.x * 2 + i) & 0x83ff83ffu);
  for (int c = 0; c < 8; ++c) for (int i = 0; i < 4; ++i) d[c][i] = 0.0f;
  __syncthreads();
  u64 start = clock_wide();
#pragma unroll 1
  for (long long i = 0; i < reps; ++i) {
#pragma unroll
    for (int k = 0; k < 4; ++k)
#pragma unroll
      for (int c = 0; c < 8; ++c)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(d[c][0]), "+f"(d[c][1]), "+f"(d[c][2]), "+f"(d[c][3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
  float kept = 0.0f;
  for (int c = 0; c < 8; ++c) for (int i = 0; i < 4; ++i) kept += d[c][i];
  if (kept == 1.2345f) out[0] = 1;
  u64 stop = clock_wide();
  if (threadIdx.x % 32 == 0) out[(long long)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32] = stop - start;
}
