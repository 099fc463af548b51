// attention.cuh for e4m3: what the schedules include under that name when Q, K and V are FP8. The verbs are the same; what differs:
// WGMMA takes 8-bit operands only K-major, so the producer warpgroup's other three warps transpose every block of V in shared
// memory (Transposer), and consumers take it from a second ring. Scales of Q, K and V are folded into softmax and epilogue. P V of
// some blocks may be added up apart from O, in TWO_LEVELS, as the tensor cores add to an accumulator with 14 bits.
// Chosen at compile time: HEAD_DIM, BLOCK_M, BLOCK_N, STAGES, V_STAGES, VT_STAGES, CONSUMERS, CONSUMER_REGISTERS, CAUSAL, SHIFT,
// KEY_PANEL, BLOCK_SCALES, TWO_LEVELS, BF16 (of O), TRACE.
#pragma once
#define CLUSTER 1
#include "softmax_fp8.cuh"
#include "tiles.cuh"
#include "trace.cuh"
#include "wgmma.cuh"

constexpr int ROWS = 64;  // of one consumer warpgroup: M of every WGMMA
constexpr int PANEL = HEAD_DIM < 128 ? HEAD_DIM : 128;  // columns, and bytes, of one swizzled row of Q, K and V
constexpr int PANELS = HEAD_DIM / PANEL;
constexpr int PANEL_STEPS = KEY_PANEL / 32;  // k steps of P V in one swizzled row, of KEY_PANEL keys, of the transposed V
constexpr int KEY_PANELS = (BLOCK_N + KEY_PANEL - 1) / KEY_PANEL;
constexpr int THREADS = WARPGROUP * (1 + CONSUMERS);
constexpr int WARP_ROWS = 16;                            // of a warpgroup's 64, one warp's in every accumulator
constexpr int STAGED = HEAD_DIM < 128 ? HEAD_DIM : 128;  // columns of O that pass through shared memory at a time
constexpr int STAGED_PANEL = 64;                         // of them in one 128-byte swizzled row
constexpr int TRANSPOSERS = 3;                           // warps
static_assert(BLOCK_M == ROWS * CONSUMERS, "one WGMMA tile of 64 queries per consumer warpgroup");
static_assert(BLOCK_N % 32 == 0, "the k step of P V is 32 keys");
static_assert(CONSUMERS <= 3, "named barriers are numbered for three consumers");

// What the CTA is launched with, 168 x 384 or 128 x 512, dealt out anew: a register more and setmaxnreg waits for ever.
constexpr int ENTRY_REGISTERS = 65536 / THREADS / 8 * 8;
constexpr int PRODUCER_REGISTERS = ENTRY_REGISTERS * (1 + CONSUMERS) - CONSUMERS * CONSUMER_REGISTERS;
static_assert(PRODUCER_REGISTERS >= 24, "setmaxnreg leaves a warp 24 registers at least");

struct Shared {
  alignas(1024) unsigned char Q[CONSUMERS][ROWS * HEAD_DIM];
  alignas(1024) unsigned char K[STAGES][BLOCK_N * HEAD_DIM];
  alignas(1024) unsigned char V[V_STAGES][BLOCK_N * HEAD_DIM];
  alignas(1024) unsigned char Vt[VT_STAGES][KEY_PANELS * KEY_PANEL * HEAD_DIM];
  alignas(1024) unsigned char O[CONSUMERS][4][WARP_ROWS * STAGED * 2];
  Ring<1> q[CONSUMERS];
  Ring<STAGES> k;
  Ring<V_STAGES> v;
  Ring<VT_STAGES> vt;
  Work work;
  Scales scales[2 * STAGES];  // of the blocks: come with K, read after its slot is free
};

// The value that an element stands for is its own times a scale in fp32. There is one for a batch entry and K/V head, or with
// BLOCK_SCALES one for 64 rows of a head of Q and for a block of a head of K or V. Null means 1.
struct Descale {
  const float* at;
  int batch_stride, head_stride;
  __device__ __forceinline__ float of(int batch, int head, int block = 0) const {
    return at == nullptr ? 1.0f : __ldg(at + (long long)batch * batch_stride + (long long)head * head_stride + block);
  }
};
struct Descales {
  Descale q, k, v;
  int together;  // blocks whose P V is added up apart, with TWO_LEVELS
};
constexpr float SMALLEST_V_SCALE = 7.888609e-31f;  // 2^-100; its inverse times a row sum is in fp32

struct Problem {
  const TensorMap &q, &k, &v, &o;
  const Params& p;
  const Descales& descales;
};

// The next number of a queue in memory, in lane 0.
__device__ __forceinline__ int draw(int* queue) {
  int number = 0;
  if (lane_id() == 0) number = atomicAdd(queue, 1);
  return number;
}

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

typedef float Scores[BLOCK_N / 2];  // a warpgroup's S of one block, in registers
typedef u32 Weights[BLOCK_N / 8];   // and its P

// A consumer warpgroup: 64 queries.
struct Consumer {
  Shared& shared;
  const Problem& problem;
  const int rank;
  Trace trace;
  Baton turn;
  int tiles = 0;             // begun
  int first = 0, last = -1;  // K/V blocks of this tile, numbered over the kernel's life, in the order of the walk
  int unmasked = 0;          // the first of them that needs no mask
  bool started = false;      // whether O holds a product of this tile
  bool grown = false;        // whether the last block moved the maximum
  float scale = 0.0f;        // of scores, in base 2, with Q's scale and, where a head has one, K's
  int apart = 0;             // blocks whose P V is in `product` and not yet in O
  float O[HEAD_DIM / 2];
  float product[TWO_LEVELS ? HEAD_DIM / 2 : 1];
  RowStateFp8 rows;

  __device__ __forceinline__ Consumer(Shared& shared, const Problem& problem, int rank)
      : shared(shared), problem(problem), rank(rank), trace(problem.p.trace, 1 + rank), turn{rank} {}

  // Wait for the next tile; false when there is none.
  __device__ __forceinline__ bool begin() {
    shared.work.posted.wait(tiles);
    if (tile().blocks < 0) return false;
    first = last + 1;
    last += tile().blocks;
    unmasked = first + tile().masked(problem.p, tile().m * BLOCK_M + rank * ROWS);
    started = false;
    if constexpr (TWO_LEVELS) {
      apart = 0;
#pragma unroll
      for (int i = 0; i < HEAD_DIM / 2; ++i) O[i] = 0.0f;
    }
    const Descales& d = problem.descales;
    if constexpr (BLOCK_SCALES)
      scale = problem.p.scale_log2 * d.q.of(tile().batch, tile().head, min(tile().m * CONSUMERS + rank, (problem.p.seqlen_q - 1) / ROWS));
    else
      scale = positive(problem.p.scale_log2 * d.q.of(tile().batch, kv_head()) * d.k.of(tile().batch, kv_head()));
    rows.start();
    trace.begin(first, last);
    return true;
  }
  __device__ __forceinline__ void end() {
    __syncwarp();
    shared.work.posted.free<1>(tiles);
    ++tiles;
  }
  __device__ __forceinline__ const Tile& tile() const { return shared.work.tile(tiles); }
  __device__ __forceinline__ int kv_head() const { return tile().head / (problem.p.heads / problem.p.kv_heads); }
  // Masked scores are -inf, and -inf * 0 is NaN.
  static __device__ __forceinline__ float positive(float scale) { return scale == 0.0f ? 1.1754944e-38f : scale; }
  __device__ __forceinline__ Scales scales_of(int j) const {
    if constexpr (!BLOCK_SCALES) return {scale, SHIFT, 1.0f};
    const Scales& found = shared.scales[j % (2 * STAGES)];
    return {positive(scale * found.scores), found.lift, found.sums};
  }
  __device__ __forceinline__ void wait_q() { shared.q[rank].wait(tiles); }
  __device__ __forceinline__ void free_q() { shared.q[rank].free<1>(tiles); }

  // The tensor cores are this warpgroup's until it gives them on.
  __device__ __forceinline__ void take(int j, Label label = Label::TAKE) {
    turn.take();
    trace.stamp(label, j);
  }
  __device__ __forceinline__ void give(int j, Label label = Label::GIVE) {
    turn.give();
    trace.stamp(label, j);
  }

  // Issue S = Q K[j]^T.
  __device__ __forceinline__ void issue_scores(Scores& S, int j) {
    shared.k.wait(j);
    // Zero is added, but only we know: descriptors kept from one block to the next would cost registers.
    const u64 a = swizzled_descriptor<PANEL>(shared.Q[rank]) + ((u32)j >> 31);
    const u64 b = swizzled_descriptor<PANEL>(shared.K[j % STAGES]);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < HEAD_DIM / 32; ++k)
      Wgmma<BLOCK_N>::ss(S, a + k / 4 * (ROWS * PANEL / 16) + k % 4 * 2, b + k / 4 * (BLOCK_N * PANEL / 16) + k % 4 * 2, k > 0);
    wgmma_commit();
    trace.stamp(Label::SCORES, j);
  }
  // What P V is added to on the tensor cores.
  __device__ __forceinline__ auto& values() {
    if constexpr (TWO_LEVELS) return product;
    else return O;
  }
  // O += product, in fp32.
  __device__ __forceinline__ void gather() {
    if (apart > 0) {
#pragma unroll
      for (int i = 0; i < HEAD_DIM / 2; ++i) O[i] += product[i];
    }
    apart = 0;
    started = false;
  }
  // Issue O += P V[j]; the first product of a tile starts O.
  __device__ __forceinline__ void issue_values(const Weights& P, int j) {
    shared.vt.wait(j);
    const u64 b = swizzled_descriptor<KEY_PANEL>(shared.Vt[j % VT_STAGES]);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < BLOCK_N / 32; ++k)
      Wgmma<HEAD_DIM>::rs(values(), P + 4 * k, b + k / PANEL_STEPS * (HEAD_DIM * KEY_PANEL / 16) + k % PANEL_STEPS * 2, k > 0 || started);
    started = true;
    wgmma_commit();
    trace.stamp(Label::VALUES, j);
  }
  // Wait until at most PENDING GEMMs are still running, then S (or O) may be read.
  template <int PENDING> __device__ __forceinline__ void wait_scores(Scores& S, int j) {
    wgmma_wait<PENDING>();
    hold(S);
    trace.stamp(Label::SCORES_DONE, j);
  }
  template <int PENDING> __device__ __forceinline__ void wait_values(int j) {
    wgmma_wait<PENDING>();
    hold(values());
    if constexpr (TWO_LEVELS) {
      if (++apart >= problem.descales.together) gather();
    }
    trace.stamp(Label::VALUES_DONE, j);
  }
  __device__ __forceinline__ void free_k(int j) { shared.k.free<1>(j); }
  __device__ __forceinline__ void free_v(int j) { shared.vt.free<1>(j); }

  // Online softmax of block j, P as the operand of the second GEMM. O is not touched, so P V of another block may still run.
  __device__ __forceinline__ void softmax(int j, Scores& S, Weights& P) {
    if (j < unmasked) mask_block(j, S);
    grown = rows.online(S, P, scales_of(j), j == first, j < unmasked);
    trace.stamp(Label::SOFTMAX, j);
    trace.seek(j + 1);
  }
  __device__ __forceinline__ void mask_block(int j, Scores& S) const {
    const Params& p = problem.p;
    const int key = (last - j) * BLOCK_N;  // the block's first
    const int end = p.seqlen_k - key, diagonal = first_row() + p.seqlen_k - p.seqlen_q + 1 - key;
    mask(S, CAUSAL ? min(end, diagonal) : end, CAUSAL ? min(end, diagonal + 8) : end);
  }
  // Multiply O by exp2(old - new maximum) where the maximum has moved; no product may be in flight.
  __device__ __forceinline__ void rescale() {
    if (!grown) return;
    rows.rescale(O);
    if constexpr (TWO_LEVELS) {
      if (apart > 0) rows.rescale(product);
    }
  }

  // O /= l and LSE. Each warp stages its own rows and leaves the copy to TMA: no one waits for an epilogue.
  __device__ __forceinline__ void store() {
    float lse[2];
    if constexpr (TWO_LEVELS) gather();
    rows.normalize(O, BLOCK_SCALES ? 1.0f : problem.descales.v.of(tile().batch, kv_head()), lse);
    const int lane = lane_id();
    const u32 at = stage() + lane % WARP_ROWS * 128;
#pragma unroll
    for (int column = 0; column < HEAD_DIM; column += STAGED) {
      claim_stage();
#pragma unroll
      for (int g = 0; g < STAGED / 8; g += 2) {
        const float* o = O + 4 * (column / 8 + g);
        const int chunk = g % 8 + lane / 16;
        store_matrices(at + g / 8 * (WARP_ROWS * 128) + (chunk ^ lane % 8) * 16, pack<BF16>(o[0], o[1]), pack<BF16>(o[2], o[3]),
                       pack<BF16>(o[4], o[5]), pack<BF16>(o[6], o[7]));
      }
      send_stage(column);
    }
    store_lse(lse);
    trace.stamp(Label::STORE, last);
  }
  // Queries that see no key: O = 0, LSE = -inf.
  __device__ __forceinline__ void store_nothing() {
    wait_q();
    free_q();
    for (int column = 0; column < HEAD_DIM; column += STAGED) {
      claim_stage();
      for (int chunk = lane_id(); chunk < WARP_ROWS * STAGED / 8; chunk += 32) store_zeros(stage() + chunk * 16);
      send_stage(column);
    }
    const float lse[2] = {NEGATIVE_INFINITY, NEGATIVE_INFINITY};
    store_lse(lse);
  }
  __device__ __forceinline__ int warp() const { return thread_id() % WARPGROUP / 32; }
  __device__ __forceinline__ u32 stage() const { return smem_address(shared.O[rank][warp()]); }
  __device__ __forceinline__ void claim_stage() const {
    if (lane_id() == 0) tma_wait_read();
    __syncwarp();
  }
  __device__ __forceinline__ void send_stage(int column) const {
    fence_async();
    __syncwarp();
    if (lane_id() == 0) {
#pragma unroll
      for (int c = 0; c < STAGED; c += STAGED_PANEL)
        tma_store(problem.o, stage() + c * (WARP_ROWS * 128 / STAGED_PANEL), column + c, first_row(), tile().head, tile().batch);
      tma_commit();
    }
  }
  __device__ __forceinline__ void store_lse(const float (&lse)[2]) const {
    const Params& p = problem.p;
    const int row = first_row();
    float* to = p.lse + (u64)(u32)(tile().batch * p.heads + tile().head) * (u32)p.seqlen_q + row;
    if (lane_id() % 4 != 0) return;
    if (row < p.seqlen_q) to[0] = lse[0];
    if (row + 8 < p.seqlen_q) to[8] = lse[1];
  }
  // Of this thread's two rows the first; the other is 8 further.
  __device__ __forceinline__ int first_row() const { return tile().m * BLOCK_M + rank * ROWS + warp() * WARP_ROWS + lane_id() / 4; }
};

__device__ __forceinline__ void produce(Producer& load, const Tile& tile);
__device__ __forceinline__ void consume(Consumer& wg);

__device__ __forceinline__ void run_producer(Producer& load) {
  const Params& p = load.problem.p;
  const int total = Work::count(p), ctas = gridDim.x;
  int index = blockIdx.x;
  for (; index < total; ++load.tiles) {
    const Tile tile = Work::locate(index, p);
    load.shared.work.announce(load.tiles, tile);
    load.begin(tile);
    if (tile.blocks > 0) {
      produce(load, tile);
    } else {
      load.load_q(tile);
      if (Work::QUEUED) load.ticket = draw(p.queue);
    }
    load.base += tile.blocks;
    index = ctas + (Work::QUEUED ? uniform(load.ticket) : index);
  }
  load.shared.work.announce(load.tiles, Tile{0, 0, 0, -1});
  // The last CTA to have drawn its last leaves the queue as it was before the launch.
  if (Work::QUEUED && uniform(draw(p.queue + 1)) == (int)gridDim.x - 1 && elected()) {
    p.queue[0] = 0;
    p.queue[1] = 0;
  }
}

__device__ __forceinline__ void run_consumer(Consumer& wg) {
  wg.turn.start();
  for (; wg.begin(); wg.end()) {
    if (wg.first <= wg.last) {
      consume(wg);
      wg.store();
    } else {
      wg.store_nothing();
    }
  }
  wg.claim_stage();  // shared memory must outlive the copies from it
}

__device__ __forceinline__ void attention(const Problem& problem) {
  extern __shared__ __align__(1024) unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const int warpgroup = uniform(threadIdx.x / WARPGROUP);
  if (threadIdx.x == 0) {
    tma_prefetch(problem.q), tma_prefetch(problem.k), tma_prefetch(problem.v), tma_prefetch(problem.o);
    for (int wg = 0; wg < CONSUMERS; ++wg) shared.q[wg].init(4);
    shared.k.init(4 * CONSUMERS);
    shared.v.init(TRANSPOSERS);
    for (int i = 0; i < VT_STAGES; ++i) {
      mbarrier_init(&shared.vt.full[i], TRANSPOSERS);
      mbarrier_init(&shared.vt.empty[i], 4 * CONSUMERS);
    }
    shared.work.init(4 * CONSUMERS + TRANSPOSERS);
    mbarrier_init_fence();
  }
  __syncthreads();

  if (warpgroup == 0) {
    fewer_registers<PRODUCER_REGISTERS>();
    const int warp = uniform(threadIdx.x / 32);
    if (warp == 0) {
      Producer load{shared, problem, Trace(problem.p.trace, 0)};
      run_producer(load);
    } else {
      Transposer transposer{shared, warp - 1};
      transposer.run();
    }
  } else {
    more_registers<CONSUMER_REGISTERS>();
    Consumer wg(shared, problem, warpgroup - 1);
    run_consumer(wg);
  }
}

extern "C" {
__constant__ int attention_smem_bytes = sizeof(Shared);
}

#define ATTENTION_FORWARD                                                                                                          \
  extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                                         \
      attention_forward(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v, \
                        const __grid_constant__ TensorMap o, const __grid_constant__ Params p,                                     \
                        const __grid_constant__ Descales descales) {                                                               \
    attention(Problem{q, k, v, o, p, descales});                                                                                   \
  }
