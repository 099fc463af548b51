// Warpgroups that repeat GEMM, softmax, GEMM on registers and shared memory, in the orders that warp-specialised kernels take,
// and stamp their blocks: how fast, how far apart, and how evenly over the SMs.
enum Order { PLAIN, PINGPONG, TWO_STAGE, BOTH, THREE_STAGE };  // BOTH: ping-pong and two stages
enum Level { BLOCKS, PARTS, STEPS, SPARSE };  // stamps of blocks, of their parts, of each k step too; of the parts of one block in 32
constexpr int BUFFERS = 2, ROW = 128;       // buffers of K and of V; bytes of a row of a panel: 64 fp16
constexpr int STAMPS = 1024, SLOTS = 32;    // stamps kept of a warpgroup; of one block, in detail: then the last 32 blocks are kept
// Slots of a block. A GEMM: its buffer is there, its fence is passed, then each k step.
enum Slot { START, SCORES_ARRIVED, SCORES_FENCED, SCORES_STEP, VALUES_ARRIVED = 19, VALUES_FENCED, VALUES_STEP, SCORES_DONE = 29, SOFTMAX_DONE, VALUES_DONE };

template <int REGISTERS> __device__ __forceinline__ void raise_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(REGISTERS)); }
template <int REGISTERS> __device__ __forceinline__ void lower_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(REGISTERS)); }
template <int COUNT> __device__ __forceinline__ void pin(float (&x)[COUNT]) {
#pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

struct Arguments {
  u32* out;
  int blocks, shift, delay1, delay2, masked;  // a stamp every 2^shift blocks; cycles; 0, which the compiler does not know
  float scale;
  const void* map;  // of a matrix of rows of 64 to load by TMA, or none
  int rows;
};

template <int D, int N, int GROUPS> struct Layout {
  static constexpr int Q = 64 * D * 2, KV = N * D * 2;
  static constexpr int K_AT = GROUPS * Q, V_AT = K_AT + BUFFERS * KV, BARRIERS_AT = V_AT + BUFFERS * KV, STAMPS_AT = BARRIERS_AT + 64;
  unsigned char* smem;
  __device__ __forceinline__ unsigned char* q(int group) const { return smem + group * Q; }
  __device__ __forceinline__ unsigned char* k(int j) const { return smem + K_AT + j % BUFFERS * KV; }
  __device__ __forceinline__ unsigned char* v(int j) const { return smem + V_AT + j % BUFFERS * KV; }
  __device__ __forceinline__ volatile u32* stamps(int group) const { return (volatile u32*)(smem + STAMPS_AT) + group * STAMPS; }
  __device__ __forceinline__ u64* full(int ring, int j) const { return (u64*)(smem + BARRIERS_AT) + ring * BUFFERS + j % BUFFERS; }
  __device__ __forceinline__ u64* empty(int ring, int j) const { return full(ring, j) + 2 * BUFFERS; }
};
enum Ring { RING_K, RING_V };

template <Order ORDER, int D, int N, int GROUPS, bool RING, Level LEVEL, bool FENCED> struct Group {
  Layout<D, N, GROUPS> at;
  Arguments args;
  int rank;
  float scale, out[D / 2], pivot[2], sum[2];
  bool moved, leader;

  __device__ __forceinline__ void stamp(int j, int slot) {
    const bool part = slot == START || slot == SCORES_STEP + D / 16 - 1 || slot == VALUES_STEP + N / 16 - 1 || slot >= SCORES_DONE;
    if (LEVEL == SPARSE) {
      if ((part || slot == SCORES_ARRIVED || slot == VALUES_ARRIVED) && leader && j % 32 == 7) at.stamps(rank)[j / 32 % (STAMPS / SLOTS) * SLOTS + slot] = clock_now();
    } else if (LEVEL == STEPS || (LEVEL == PARTS && part)) {
      if (leader) at.stamps(rank)[j % (STAMPS / SLOTS) * SLOTS + slot] = clock_now();
    } else if (LEVEL == BLOCKS && slot == START) {
      if (leader && (j & ((1 << args.shift) - 1)) == 0) at.stamps(rank)[j >> args.shift] = clock_now();
    }
  }
  __device__ __forceinline__ void arrived(Ring ring, int j) {
    if (RING) mbarrier_wait(at.full(ring, j), j / BUFFERS & 1);
  }
  __device__ __forceinline__ void done(Ring ring, int j) {
    if (RING && threadIdx.x % 32 == 0) mbarrier_arrive(at.empty(ring, j));
  }
  __device__ __forceinline__ void take() {
    if (ORDER == PINGPONG || ORDER == BOTH) bar_sync(1 + rank, 256);
  }
  __device__ __forceinline__ void give() {
    if (ORDER == PINGPONG || ORDER == BOTH) bar_arrive(1 + (rank + 1) % GROUPS, 256);
  }

  // `block` is the one whose stamps these are. Without a fence there may be no branch behind the last one, so the caller has waited.
  __device__ __forceinline__ void issue_scores(float (&s)[N / 2], int j, int block, bool fenced) {
    if (fenced) arrived(RING_K, j);
    stamp(block, SCORES_ARRIVED);
    const u64 a = descriptor(at.q(rank), 0, 1024) + ((u32)j >> 31), b = descriptor(at.k(j), 0, 1024);
    if (fenced) wgmma_fence();
    stamp(block, SCORES_FENCED);
#pragma unroll
    for (int k = 0; k < D / 16; ++k) {
      Wgmma<N>::ss(s, a + k / 4 * (64 * ROW / 16) + k % 4 * 2, b + k / 4 * (N * ROW / 16) + k % 4 * 2, k > 0);
      stamp(block, SCORES_STEP + k);
    }
    wgmma_commit();
  }
  __device__ __forceinline__ void issue_values(const u32 (&p)[N / 4], int j, int block, bool fenced) {
    if (fenced) arrived(RING_V, j);
    stamp(block, VALUES_ARRIVED);
    const u64 b = descriptor(at.v(j), N * ROW, 1024);
    if (fenced) wgmma_fence();
    stamp(block, VALUES_FENCED);
#pragma unroll
    for (int k = 0; k < N / 16; ++k) {
      Wgmma<D>::rs(out, p + 4 * k, b + k * (16 * ROW / 16), 1);
      stamp(block, VALUES_STEP + k);
    }
    wgmma_commit();
  }

  // Weights from the pivots, packed; per row the sum of this thread's share.
  __device__ __forceinline__ void weigh(const float (&s)[N / 2], u32 (&p)[N / 4], float (&block)[2]) {
    float even[2] = {0.0f, 0.0f}, odd[2] = {0.0f, 0.0f};
    const float offset[2] = {pivot[0] * scale, pivot[1] * scale};
#pragma unroll
    for (int i = 0; i < N / 4; ++i) {
      float x = exp2_fast(__fmaf_rn(s[2 * i], scale, -offset[i & 1])), y = exp2_fast(__fmaf_rn(s[2 * i + 1], scale, -offset[i & 1]));
      even[i & 1] += x;
      odd[i & 1] += y;
      p[i] = pack_fp16(y, x);
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) block[r] = even[r] + odd[r];
  }
  // The running softmax: only weights that grow large look for another pivot, which on this data never happens.
  __device__ __forceinline__ void softmax(float (&s)[N / 2], u32 (&p)[N / 4], int j) {
    if (j < args.masked) {  // never; nor does the compiler mix the arithmetic with what is issued before
#pragma unroll
      for (int i = 0; i < N / 2; ++i) s[i] = i < args.shift ? s[i] : -1e30f;
    }
    float block[2];
    weigh(s, p, block);
    moved = !__all_sync(0xffffffffu, block[0] <= 1024.0f && block[1] <= 1024.0f);
    if (moved) {
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float high = pivot[r];
#pragma unroll
        for (int i = 0; i < N / 8; ++i) high = fmaxf(high, fmaxf(s[4 * i + 2 * r], s[4 * i + 2 * r + 1]));
        high = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 1));
        pivot[r] = fmaxf(high, __shfl_xor_sync(0xffffffffu, high, 2));
        sum[r] *= 0.5f;
      }
      weigh(s, p, block);
    }
    sum[0] += block[0];
    sum[1] += block[1];
  }
  __device__ __forceinline__ void rescale() {
    if (!moved) return;
#pragma unroll
    for (int i = 0; i < D / 2; ++i) out[i] *= 0.5f;
  }

  __device__ __forceinline__ void plain_block(int j) {
    float s[N / 2];
    u32 p[N / 4];
    stamp(j, START);
    issue_scores(s, j, j, true);
    give();
    wgmma_wait<0>();
    pin(s);
    stamp(j, SCORES_DONE);
    done(RING_K, j);
    softmax(s, p, j);
    stamp(j, SOFTMAX_DONE);
    rescale();
    take();
    issue_values(p, j, j, true);
    wgmma_wait<0>();
    pin(out);
    stamp(j, VALUES_DONE);
    done(RING_V, j);
  }
  __device__ __forceinline__ void two_stage_block(int j, const u32 (&p)[N / 4], u32 (&next)[N / 4]) {
    float s[N / 2];
    take();
    stamp(j, START);
    if (!FENCED) arrived(RING_V, j - 1);
    issue_scores(s, j, j, true);
    issue_values(p, j - 1, j, FENCED);
    give();
    wgmma_wait<1>();
    pin(s);
    stamp(j, SCORES_DONE);
    done(RING_K, j);
    softmax(s, next, j);
    stamp(j, SOFTMAX_DONE);
    wgmma_wait<0>();
    pin(out);
    stamp(j, VALUES_DONE);
    done(RING_V, j - 1);
    rescale();
  }
  __device__ __forceinline__ void three_stage_block(int j, float (&s)[N / 2], float (&coming)[N / 2], const u32 (&p)[N / 4], u32 (&next)[N / 4]) {
    stamp(j, START);
    if (!FENCED) arrived(RING_K, j + 1);
    issue_values(p, j - 1, j, true);
    issue_scores(coming, j + 1, j, FENCED);
    softmax(s, next, j);
    stamp(j, SOFTMAX_DONE);
    wgmma_wait<1>();
    pin(out);
    stamp(j, VALUES_DONE);
    done(RING_V, j - 1);
    wgmma_wait<0>();
    pin(coming);
    stamp(j, SCORES_DONE);
    done(RING_K, j + 1);
    rescale();
  }
  __device__ __forceinline__ void first_block(float (&s)[N / 2]) {
    issue_scores(s, 0, 0, true);
    wgmma_wait<0>();
    pin(s);
    done(RING_K, 0);
  }

  __device__ __forceinline__ float run() {
    float s[N / 2];
    u32 p[N / 4], q[N / 4];
    scale = args.scale;
    leader = threadIdx.x % 128 == 0;
#pragma unroll
    for (int i = 0; i < D / 2; ++i) out[i] = 0.0f;
    pivot[0] = pivot[1] = 4.3f / scale;
    sum[0] = sum[1] = 0.0f;
    u32 target = clock_now() + 1000 + (rank == 0 ? 0 : rank == 1 ? args.delay1 : args.delay2);
    while ((int)(clock_now() - target) < 0) {}
    if (rank == GROUPS - 1) give();
    if (ORDER == PLAIN || ORDER == PINGPONG) {
      take();
#pragma unroll 1
      for (int j = 0; j < args.blocks; ++j) plain_block(j);
      give();
    } else if (ORDER == TWO_STAGE || ORDER == BOTH) {
      first_block(s);
      softmax(s, p, 0);
#pragma unroll 1
      for (int j = 1; j < args.blocks; j += 2) {
        two_stage_block(j, p, q);
        two_stage_block(j + 1, q, p);
      }
    } else {
      float odd[N / 2];
      first_block(s);
      issue_scores(odd, 1, 0, true);
      softmax(s, p, 0);
      wgmma_wait<0>();
      pin(odd);
      done(RING_K, 1);
#pragma unroll 1
      for (int j = 1; j < args.blocks; j += 2) {
        three_stage_block(j, odd, s, p, q);
        three_stage_block(j + 1, s, odd, q, p);
      }
      pin(odd);
    }
    bar_sync(8 + rank, 128);
    for (int i = threadIdx.x % 128; i < STAMPS; i += 128) args.out[((long long)blockIdx.x * GROUPS + rank) * STAMPS + i] = at.stamps(rank)[i];
    float total = sum[0] + sum[1];
#pragma unroll
    for (int i = 0; i < D / 2; ++i) total += out[i];
    return total;
  }
};

// Stands in for TMA: says at once that a freed buffer is full.
template <Order ORDER, class At> __device__ __forceinline__ void feed(const At& at, int blocks) {
  constexpr int LAG = ORDER == THREE_STAGE ? 2 : ORDER == TWO_STAGE || ORDER == BOTH ? 1 : 0;
  for (int i = 0; i < blocks + 2; ++i) {
    for (int turn = 0; turn < 2; ++turn) {
      Ring ring = (turn == 0) == (LAG == 2) ? RING_V : RING_K;
      int j = ring == RING_V ? i - LAG : i;
      if (j < 0 || j >= blocks + 2) continue;
      mbarrier_wait(at.empty(ring, j), (j / BUFFERS & 1) ^ 1);
      mbarrier_arrive(at.full(ring, j));
    }
  }
}

// The same by TMA, in order, box after box, all SMs through the same rows.
template <Order ORDER, int D, int N, class At> __device__ __forceinline__ void feed_by_tma(const At& at, const Arguments& args) {
  constexpr int LAG = ORDER == THREE_STAGE ? 2 : ORDER == TWO_STAGE || ORDER == BOTH ? 1 : 0;
  int row = 0;
  for (int i = 0; i < args.blocks + 2; ++i) {
    for (int turn = 0; turn < 2; ++turn) {
      Ring ring = (turn == 0) == (LAG == 2) ? RING_V : RING_K;
      int j = ring == RING_V ? i - LAG : i;
      if (j < 0 || j >= args.blocks + 2) continue;
      mbarrier_wait(at.empty(ring, j), (j / BUFFERS & 1) ^ 1);
      mbarrier_expect(at.full(ring, j), N * D * 2);
      unsigned char* to = ring == RING_K ? at.k(j) : at.v(j);
#pragma unroll 1
      for (int c = 0; c < D / 64; ++c) {
        tma_load(to + c * N * ROW, args.map, at.full(ring, j), 0, row);
        row += N;
        if (row + N > args.rows) row = 0;
      }
    }
  }
}

template <Order ORDER, int D, int N, int GROUPS, bool RING, Level LEVEL, bool FENCED> __device__ __forceinline__ void pace(Arguments args) {
  extern __shared__ __align__(1024) unsigned char smem[];
  Layout<D, N, GROUPS> at{smem};
  if (threadIdx.x == 0) {
    for (int i = 0; i < 2 * BUFFERS; ++i) mbarrier_init(at.full(RING_K, 0) + i, 1), mbarrier_init(at.empty(RING_K, 0) + i, 4 * GROUPS);
    fence_init();
  }
  fill_normal(smem, at.BARRIERS_AT, blockIdx.x * 7919u);
  const int rank = __shfl_sync(0xffffffffu, threadIdx.x / 128, 0);  // uniform: descriptors stay out of vector registers
  if (rank == GROUPS) {
    if (GROUPS > 1) lower_registers<GROUPS == 3 ? 32 : 24>();  // one alone keeps what it was launched with
    if (RING && threadIdx.x % 128 == 0) {
      if (args.map) feed_by_tma<ORDER, D, N>(at, args);
      else feed<ORDER>(at, args.blocks);
    }
  } else {
    if (GROUPS > 1) raise_registers<GROUPS == 3 ? 160 : 240>();
    Group<ORDER, D, N, GROUPS, RING, LEVEL, FENCED> group{at, args, rank};
    if (group.run() == 1.2345f) args.out[0] = 1;
  }
}

#define PACE(NAME, ORDER, D, N, GROUPS, RING, LEVEL, FENCED)                                                                    \
  extern "C" __global__ void __launch_bounds__((GROUPS + 1) * 128, 1)                                                           \
  NAME(u32* out, long long blocks, long long shift, long long delay1, long long delay2, long long masked, float scale,          \
       const void* map, long long rows) {                                                                                       \
    pace<ORDER, D, N, GROUPS, RING, LEVEL, FENCED>(                                                                             \
        {out, (int)blocks, (int)shift, (int)delay1, (int)delay2, (int)masked, scale, map, (int)rows});                          \
  }
