// GEMMs as attention does them, on fresh data: one thread streams tiles of 128 rows of K or V through a ring by TMA, two
// warpgroups multiply. A tile is two boxes of 128 rows x 64 columns (16 bit), 128-byte swizzle; all of them are d = 128.
constexpr int BOX_BYTES = 128 * 64 * 2, STREAM_TILE_BYTES = 2 * BOX_BYTES, STREAM_STAGES = 5, UNIT_TILES = 4;
constexpr int RESTART = 16;  // units of PV after which O starts anew
enum Company { FREE, TOGETHER, TURNS, ALONE };  // how the two warpgroups go: as they come, in step, one at a time; or one
enum Work { QK, QK_FROM_REGISTERS, PV, ATTENTION };

struct StreamRing { u64 full[STREAM_STAGES], empty[STREAM_STAGES], q; int consumers_done; };
struct Turn {
  int stage = 0;
  u32 phase = 0;
  __device__ __forceinline__ void next() { if (++stage == STREAM_STAGES) { stage = 0; phase ^= 1; } }
};

// CTAs of one group read the same tiles in the same order; the n-th of a group starts n * skew tiles ahead of the first.
struct TileOrder {
  int first, share, tile;
  __device__ __forceinline__ TileOrder(long long window, long long groups, long long skew) {
    share = (int)(window / STREAM_TILE_BYTES / groups);
    first = (int)(blockIdx.x % groups) * share;
    tile = (int)(blockIdx.x / groups * skew % share);
  }
  __device__ __forceinline__ void load(unsigned char* to, const void* map, u64* full) {
    mbarrier_expect(full, STREAM_TILE_BYTES);
    tma_load(to, map, full, 0, (first + tile) * 256);
    tma_load(to + BOX_BYTES, map, full, 0, (first + tile) * 256 + 128);
    if (++tile == share) tile = 0;
  }
};

template <bool RESIDENT>
__device__ __forceinline__ void produce(Pace p, StreamRing& ring, unsigned char* smem, const void* map, TileOrder order, long long window) {
  mbarrier_expect(&ring.q, STREAM_TILE_BYTES);  // Q lies behind the window
  tma_load(smem, map, &ring.q, 0, (int)(window / 128));
  tma_load(smem + BOX_BYTES, map, &ring.q, 0, (int)(window / 128) + 128);
  long long count = RESIDENT ? STREAM_STAGES : p.bursts * p.units * UNIT_TILES;
  Turn turn;
#pragma unroll 1
  for (long long i = 0; i < count; ++i) {
    if (i >= STREAM_STAGES) mbarrier_wait(&ring.empty[turn.stage], turn.phase ^ 1);
    order.load(smem + (1 + turn.stage) * STREAM_TILE_BYTES, map, &ring.full[turn.stage]);
    turn.next();
  }
}

template <Work WORK, class Mma, bool RESIDENT, int FRAGMENTS>
__device__ __forceinline__ float consume(Pace p, StreamRing& ring, unsigned char* smem, const u32* fragments, int company) {
  constexpr int PANEL = BOX_BYTES / 16;
  int thread = threadIdx.x - 128, wg = thread / 128;
  Accumulator<128> s, o;
  s.clear();
  o.clear();
  u32 a[FRAGMENTS];  // P, or Q; two tiles in succession take different parts
#pragma unroll
  for (int i = 0; i < FRAGMENTS; ++i) a[i] = fragments[i * 256 + thread];
  u64 q = descriptor(smem + wg * 64 * 128, 16, 1024);
  mbarrier_wait(&ring.q, 0);
  Turn turn;
  u32 unit = 0;
  float read = 0.0f;
  if (company == TURNS && wg == 1) bar_arrive(1, 256);
  paced(p, [&] {
    if (company == TOGETHER) bar_sync(1, 256);
    if (company == TURNS) bar_sync(1 + wg, 256);
#pragma unroll
    for (int t = 0; t < UNIT_TILES; ++t) {
      const unsigned char* tile = smem + (1 + turn.stage) * STREAM_TILE_BYTES;
      mbarrier_wait(&ring.full[turn.stage], RESIDENT ? 0 : turn.phase);
      wgmma_fence();
#pragma unroll
      for (int k = 0; k < 8; ++k) {
        int along = (k / 4) * PANEL + (k % 4) * 2;  // K-major: four steps of 32 bytes in a row, then the next panel
        if (WORK == QK || (WORK == ATTENTION && t % 2 == 0)) Mma::ss(s.d, q + along, descriptor(tile, 16, 1024) + along, k > 0);
        else if (WORK == QK_FROM_REGISTERS) WgmmaKMajor<128>::rs(s.d, a + (16 * (t % 2) + 4 * k) % FRAGMENTS, descriptor(tile, 16, 1024) + along, k > 0);
        else Mma::rs(o.d, a + (16 * (t / 2 % 2) + 4 * k) % FRAGMENTS, descriptor(tile, BOX_BYTES, 1024) + k * (16 * 128 / 16), k > 0 || t != (WORK == PV ? 0 : 1) || unit % RESTART);
      }
      wgmma_commit();
      wgmma_wait<0>();
      read += s.d[t];  // or the compiler drops a GEMM whose result the next one overwrites
      if (!RESIDENT && threadIdx.x % 32 == 0) mbarrier_arrive(&ring.empty[turn.stage]);
      turn.next();
    }
    if (company == TURNS) bar_arrive(2 - wg, 256);
    ++unit;
  });
  return s.sum() + o.sum() + read;
}

template <int N> __device__ __forceinline__ void take_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(N)); }
template <int N> __device__ __forceinline__ void give_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(N)); }

template <Work WORK, class Mma, bool RESIDENT, bool BESIDE_SOFTMAX>
__device__ __forceinline__ void stream(u64* out, unsigned char* smem, Pace p, const void* map, const u32* fragments, long long window, long long groups, long long skew, int company) {
  __shared__ StreamRing ring;
  if (threadIdx.x == 0) {
    for (int i = 0; i < STREAM_STAGES; ++i) { mbarrier_init(&ring.full[i], 1); mbarrier_init(&ring.empty[i], company == ALONE ? 4 : 8); }
    mbarrier_init(&ring.q, 1);
    ring.consumers_done = 0;
    fence_init();
  }
  __syncthreads();
  u64 cycles = clock_wide(), ns = nanoseconds();
  float keep = 0.0f;
  if (threadIdx.x < 128) {
    give_registers<24>();
    if (threadIdx.x == 0) produce<RESIDENT>(p, ring, smem, map, TileOrder(window, groups, skew), window);
  } else if (threadIdx.x < 384) {
    take_registers<BESIDE_SOFTMAX ? 200 : 240>();
    if (company != ALONE || threadIdx.x < 256) keep = consume<WORK, Mma, RESIDENT, BESIDE_SOFTMAX ? 32 : 48>(p, ring, smem, fragments, company);
    *(volatile int*)&ring.consumers_done = 1;
  } else if (BESIDE_SOFTMAX) {
    give_registers<88>();
    FreshSoftmax<64, 32, ALL> tile;
    tile.start();
    float scale = 0.1275f;
    while (!*(volatile int*)&ring.consumers_done) { tile.step(scale); scale *= 1.0000001f; rest(p.sleep_ns / 12); }
    keep = tile.total();
  }
  __syncwarp();
  finish(out, cycles, ns, keep);
}
#define STREAM(NAME, WORK, MMA, RESIDENT, BESIDE)                                                                         \
  POWER_KERNEL(NAME, BESIDE ? 512 : 384) {                                                                                \
    extern __shared__ __align__(1024) unsigned char smem[];                                                               \
    stream<WORK, MMA, RESIDENT, BESIDE>(out, smem, {bursts, units, sleep_ns}, map, fragments, window, groups, skew, (int)company);  \
  }
STREAM(stream_qk, QK, Wgmma<128>, false, false)
STREAM(stream_qk_from_registers, QK_FROM_REGISTERS, Wgmma<128>, false, false)
STREAM(stream_pv, PV, Wgmma<128>, false, false)
STREAM(stream_attention, ATTENTION, Wgmma<128>, false, false)
STREAM(stream_attention_bf16, ATTENTION, WgmmaBf16<128>, false, false)
STREAM(resident_attention, ATTENTION, Wgmma<128>, true, false)
STREAM(stream_attention_beside_softmax, ATTENTION, Wgmma<128>, false, true)

// The loads alone.
POWER_KERNEL(stream_loads, 32) {
  extern __shared__ __align__(1024) unsigned char smem[];
  __shared__ u64 full[STREAM_STAGES];
  u64 cycles = clock_wide(), ns = nanoseconds();
  if (threadIdx.x == 0) {
    for (int i = 0; i < STREAM_STAGES; ++i) mbarrier_init(&full[i], 1);
    fence_init();
    TileOrder order(window, groups, skew);
    Turn turn;
    long long issued = 0;
    paced({bursts, units, sleep_ns}, [&] {
#pragma unroll 1
      for (int t = 0; t < UNIT_TILES; ++t) {
        if (issued >= STREAM_STAGES) mbarrier_wait(&full[turn.stage], turn.phase ^ 1);
        order.load(smem + turn.stage * STREAM_TILE_BYTES, map, &full[turn.stage]);
        turn.next();
        ++issued;
      }
    });
    for (int i = 0; i < STREAM_STAGES; ++i) {
      mbarrier_wait(&full[turn.stage], turn.phase ^ 1);
      turn.next();
    }
  }
  __syncwarp();
  finish(out, cycles, ns, 0.0f);
}
