// Latency of TMA loads under load: one warp issues, another waits and stamps, so that neither delays the other.
constexpr int BOX_BYTES = 16 * 1024;  // 128 rows of 64 fp16
constexpr int SLOTS = 4;

// Every `interval` cycles a CTA asks for `boxes` tiles of 16 KiB; at most SLOTS requests are out. begins: (CTA, [first tile,
// cycles late]); it walks on from there through `tiles`. out: (CTA, request, [issued at, latency of all boxes]).
extern "C" __global__ void __launch_bounds__(64) paced_loads(u32* out, u64* rate, const u32* begins, const void* map, long long tiles,
                                                             long long count, long long interval, long long boxes) {
  extern __shared__ __align__(1024) unsigned char smem[];
  __shared__ u64 full[SLOTS], empty[SLOTS];
  __shared__ volatile u32 issued[SLOTS];
  if (threadIdx.x == 0) {
    for (int i = 0; i < SLOTS; ++i) { mbarrier_init(&full[i], 1); mbarrier_init(&empty[i], 1); }
    fence_init();
  }
  __syncthreads();
  if (threadIdx.x % 32) return;
  u64 begin = clock_wide(), ns = nanoseconds();
  if (threadIdx.x == 0) {
    int tile = (int)begins[2 * blockIdx.x];
    u64 together = (nanoseconds() / 8192 + 2) * 8192;  // all SMs begin at the same time
    while (nanoseconds() < together) {}
    u32 due = clock_now() + begins[2 * blockIdx.x + 1];
    for (int i = 0; i < (int)count; ++i) {
      int slot = i % SLOTS;
      if (i >= SLOTS) mbarrier_wait(&empty[slot], (i / SLOTS - 1) & 1);
      while ((int)(clock_now() - due) < 0) {}
      due += (u32)interval;
      issued[slot] = clock_now();
      mbarrier_expect(&full[slot], (u32)boxes * BOX_BYTES);
      for (int b = 0; b < (int)boxes; ++b) {
        tma_load(smem + (slot * (int)boxes + b) * BOX_BYTES, map, &full[slot], 0, tile * 128);
        if (++tile == (int)tiles) tile = 0;
      }
    }
  } else {
    for (int i = 0; i < (int)count; ++i) {
      int slot = i % SLOTS;
      mbarrier_wait(&full[slot], (i / SLOTS) & 1);
      u32 now = clock_now(), then = issued[slot];
      mbarrier_arrive(&empty[slot]);
      out[(blockIdx.x * count + i) * 2] = then;
      out[(blockIdx.x * count + i) * 2 + 1] = now - then;
    }
    rate[2 * blockIdx.x] = clock_wide() - begin;
    rate[2 * blockIdx.x + 1] = nanoseconds() - ns;
  }
}
