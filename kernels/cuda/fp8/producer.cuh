// The producer warpgroup: one warp loads, three transpose V.
#pragma once
#include "layout.cuh"

// The loading warp, whose elected lane issues every TMA load of its CTA.
struct Producer {
  Shared& shared;
  const Problem& problem;
  Trace trace;
  int tiles = 0, base = 0;  // tiles begun, K/V blocks loaded before this tile
  int kv_head = 0;
  int ticket = 0;                        // lane 0's of the next tile
  float k_scale = 1.0f, v_scale = 1.0f;  // a lane's: of one of the 32 blocks walked next

  __device__ __forceinline__ void begin(const Tile& tile) {
    kv_head = tile.head / (problem.p.heads / problem.p.kv_heads);
    trace.begin(base, base + tile.blocks - 1);
  }

  __device__ __forceinline__ void load_q(const Tile& tile) {
#pragma unroll
    for (int wg = 0; wg < CONSUMERS; ++wg) {
      Ring<1>& ring = shared.q[wg];
      ring.wait_free(tiles);
      if (elected()) {
        mbarrier_expect(ring.full_of(tiles), sizeof(shared.Q[wg]));
#pragma unroll 1
        for (int c = 0; c < PANELS; ++c)
          tma_load(shared.Q[wg] + c * ROWS * PANEL, problem.q, ring.full_of(tiles), c * PANEL, tile.m * BLOCK_M + wg * ROWS, tile.head,
                   tile.batch);
      }
    }
    trace.stamp(Label::LOAD_Q, base);
  }
  __device__ __forceinline__ void load_k(const Tile& tile, int j) {
    Scales* scales = nullptr;
    Scales found;
    if constexpr (BLOCK_SCALES) {
      found = scales_of(tile, j);
      scales = &shared.scales[(base + j) % (2 * STAGES)];
    }
    load(problem.k, shared.k, shared.K[(base + j) % STAGES], tile, j, found, scales);
    trace.stamp(Label::LOAD_K, base + j);
  }
  // A tile's last load: the next tile is drawn beside it, no earlier, or the CTAs of a head would fall apart.
  __device__ __forceinline__ void load_v(const Tile& tile, int j) {
    if (Work::QUEUED && j == tile.blocks - 1) ticket = draw(problem.p.queue);
    load(problem.v, shared.v, shared.V[(base + j) % V_STAGES], tile, j);
    trace.stamp(Label::LOAD_V, base + j);
  }
  // Of block j of the walk, fetched 32 at a time.
  __device__ __forceinline__ Scales scales_of(const Tile& tile, int j) {
    if (j % 32 == 0) {
      const int block = max(0, tile.blocks - 1 - j - lane_id());
      k_scale = problem.descales.k.of(tile.batch, kv_head, block);
      v_scale = problem.descales.v.of(tile.batch, kv_head, block);
    }
    const float k = __shfl_sync(0xffffffffu, k_scale, j % 32), given = __shfl_sync(0xffffffffu, v_scale, j % 32);
    const float v = given < SMALLEST_V_SCALE ? SMALLEST_V_SCALE : given;  // NaN stays
    return {k, SHIFT + log2_approx(v), reciprocal_approx(v)};
  }
  // Block j of the walk.
  template <int COUNT>
  __device__ __forceinline__ void load(
      const TensorMap& map, Ring<COUNT>& ring, unsigned char* to, const Tile& tile, int j, const Scales& scales = {}, Scales* scales_to = nullptr) {
    ring.wait_free(base + j);
    if (elected()) {
      u64* full = ring.full_of(base + j);
      if (scales_to) *scales_to = scales;
      mbarrier_expect(full, BLOCK_N * HEAD_DIM);
#pragma unroll 1
      for (int c = 0; c < PANELS; ++c)
        tma_load(to + c * BLOCK_N * PANEL, map, full, c * PANEL, (tile.blocks - 1 - j) * BLOCK_N, kv_head, tile.batch);
    }
  }
};

// A transposing warp: its share of every block of V, keys x columns, becomes columns x keys.
//
// A unit is 32 keys x 16 columns. LDSM.T moves pairs of bytes: lane 4 c + i then has, of columns 2 c and 2 c + 1, keys 2 i and
// 2 i + 1 of each 8 x 8 matrix; two byte permutes make of two matrices four keys of one column each. STSM writes those as 16-byte
// rows whose position 4 i + {0, 1, 2, 3} is key 2 i + {0, 1, 8, 9}, the order in which a lane's accumulators of S lie: P is packed
// without a shuffle. Lanes of the upper four c store their two columns in the other order: the eight rows of a matrix, two apart
// otherwise, are then in all eight chunks of the swizzle, and no two meet in a bank.
struct Transposer {
  Shared& shared;
  const int rank;
  int tiles = 0, block = 0;  // begun; transposed over the kernel's life

  // Units side by side, whose addresses differ by constants: a panel's where the warps then have equal shares.
  static constexpr int ACROSS = PANEL / 16, GROUPS = BLOCK_N / 32;
  static constexpr int FLIGHT = 2;  // loads at a time: 24 registers hold no more
  static constexpr int RUN = GROUPS * PANELS % TRANSPOSERS == 0 ? ACROSS : 4, RUNS = HEAD_DIM / 16 / RUN;

  __device__ __forceinline__ void run() {
    for (;; ++tiles) {
      shared.work.posted.wait(tiles);
      const int blocks = shared.work.tile(tiles).blocks;
      __syncwarp();
      shared.work.posted.free<1>(tiles);
      if (blocks < 0) return;
      for (int end = block + blocks; block < end; ++block) {
        shared.v.wait(block);
        shared.vt.wait_free(block);
        transpose(smem_address(shared.V[block % V_STAGES]), smem_address(shared.Vt[block % VT_STAGES]));
        fence_async();
        __syncwarp();
        shared.v.free<1>(block);
        if (lane_id() == 0) mbarrier_arrive(shared.vt.full_of(block));
      }
    }
  }

  // The addresses are made anew for every run: registers that would hold them hold loads in flight instead.
  __device__ __forceinline__ void transpose(u32 V, u32 Vt) const {
    const int lane = lane_id();
    // The swizzle: of 16-byte chunks, in rows of 128 bytes by the row's number in a group of 8, in rows of 64 by half of it, of 32
    // by a quarter.
    const u32 source = V + lane * PANEL + (PANEL == 128 ? lane % 8 : lane / 2 % 4) * 16;
    const int column = 2 * (lane % 8) + ((lane / 8 & 1) ^ (lane % 8 >= 4));  // of a unit's 16, whose keys this lane's row of STSM is
    const u32 target = Vt + column * KEY_PANEL + (lane / 16 ^ column / (128 / KEY_PANEL) % (KEY_PANEL / 16)) * 16;
    const u32 even = lane >= 16 ? 0x7531 : 0x6420;  // the bytes that this lane stores first
#pragma unroll 1
    for (int task = rank; task < GROUPS * RUNS; task += TRANSPOSERS) {
      const int group = task / RUNS, run = task % RUNS;
      const u32 from = (source + run * RUN / ACROSS * (BLOCK_N * PANEL) + group * (32 * PANEL)) ^ (run * RUN % ACROSS * 16);
      const u32 to = (target + group / PANEL_STEPS * (HEAD_DIM * KEY_PANEL) + run * (RUN * 16 * KEY_PANEL)) ^ (group % PANEL_STEPS * 32);
      u32 x[FLIGHT][4];
#pragma unroll
      for (int u = 0; u < FLIGHT; ++u) load_matrices_transposed(x[u], from ^ (u * 16));
#pragma unroll
      for (int chunk = 0; chunk < RUN; ++chunk) {
        u32 (&now)[4] = x[chunk % FLIGHT];
        u32 y[4] = {permute_bytes(now[0], now[1], even), permute_bytes(now[0], now[1], even ^ 0x1111), permute_bytes(now[2], now[3], even),
                    permute_bytes(now[2], now[3], even ^ 0x1111)};
        if (chunk + FLIGHT < RUN) load_matrices_transposed(now, from ^ ((chunk + FLIGHT) * 16));
        store_matrices(to + chunk * (16 * KEY_PANEL), y[0], y[1], y[2], y[3]);
      }
    }
  }
};
