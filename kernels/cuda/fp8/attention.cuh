// attention.cuh for e4m3: what the schedules include under that name when Q, K and V are FP8. The verbs are the same; what differs:
// WGMMA takes 8-bit operands only K-major, so the producer warpgroup's other three warps transpose every block of V in shared
// memory (producer.cuh), and consumers take it from a second ring. Scales of Q, K and V are folded into softmax and epilogue. P V of
// some blocks may be added up apart from O, in TWO_LEVELS, as the tensor cores add to an accumulator with 14 bits.
// Chosen at compile time: HEAD_DIM, BLOCK_M, BLOCK_N, STAGES, V_STAGES, VT_STAGES, CONSUMERS, CONSUMER_REGISTERS, CAUSAL, SHIFT,
// KEY_PANEL, BLOCK_SCALES, TWO_LEVELS, APPROXIMATE, BF16 (of O), TRACE.
#pragma once
#define CLUSTER 1
#include "producer.cuh"
#include "wgmma.cuh"

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
