// The quantiser in one pass over memory: 16 bits are read once, e4m3 and one fp32 descale a block of rows are written; with the
// signs and the Hadamard transform of each row on the way, or V as rows of keys. fp8/plain.py says what it gives, to the bit.
//
// A tile is CTA_ROWS rows of one head, one or more whole blocks. TMA brings it into a slot of shared memory and takes e4m3 from
// there, so that what is in flight needs no registers; each block writes its e4m3 over its own rows. A thread holds ELEMENTS of a
// row, runs of RUN that lie LANES * RUN apart: of the transform's log2 HEAD_DIM exchanges all but log2 LANES are between its
// registers. Where V becomes rows of keys it holds 32 keys of some columns instead, and packing them is the transposition.
// Chosen at compile time: HEAD_DIM, BF16, ELEMENTS, CTA_ROWS, CTAS (of an SM), SLOTS, KEY_PANEL (keys of a swizzled row of V; or 0).
#include "ptx_fp8.cuh"

#define INFINITE __int_as_float(0x7f800000)

constexpr int RUN = 16;                     // 16 bytes of e4m3
constexpr int LANES = HEAD_DIM / ELEMENTS;  // threads that share a row
constexpr int COLUMNS = ELEMENTS / 32;      // of a thread that has 32 keys
constexpr int WARP_ROWS = 32 / LANES;
constexpr int THREADS = CTA_ROWS * LANES, WARPS = THREADS / 32;
constexpr int PANEL = 64, PANEL_BYTES = CTA_ROWS * 128;  // columns of 16 bits in a swizzled row
constexpr int PANELS = HEAD_DIM / PANEL;
constexpr int OUT_PANEL = HEAD_DIM < 128 ? HEAD_DIM : 128;  // columns of e4m3 in a swizzled row
constexpr int OUT_PANELS = HEAD_DIM / OUT_PANEL;
constexpr int SLOT_BYTES = PANELS * PANEL_BYTES;
constexpr int MOST_OPERANDS = 3;
static_assert(THREADS <= 1024 && CTA_ROWS <= 256, "threads of a CTA, rows of a box of TMA");
static_assert(COLUMNS == 2 || COLUMNS == 4, "words of 4 or 8 bytes");
static_assert(CTA_ROWS % WARP_ROWS == 0 && CTA_ROWS % 8 == 0, "whole warps, whole swizzles");

struct Operand {
  float* descale;
  int heads, seqlen, block, blocks;  // rows of a block; blocks of a head
  int tiles, end;                    // tiles of a head; number of the first tile of the next operand
  int hadamard, powers, keyed;
};
struct Operands {
  Operand of[MOST_OPERANDS];
  const u32* signs;  // HEAD_DIM / 2 pairs of sign bits
  float normaliser;
  int count;  // tiles
};
struct Maps {
  TensorMap from[MOST_OPERANDS], to[MOST_OPERANDS];
};
struct alignas(16) Place {
  int operand, batch, head, row;
};
// Of a warp, in the tiles of an operand: its own first row, its block's, the block's warps and barrier.
struct alignas(16) Team {
  int row, first, warps, barrier;
};
struct Shared {
  alignas(1024) unsigned char slots[SLOTS][SLOT_BYTES];
  alignas(16) u32 signs[HEAD_DIM / 2];
  Team teams[MOST_OPERANDS][WARPS];
  Place places[2 * SLOTS], upcoming;  // by turn: the one before is still read while its slot is filled anew
  u64 full[SLOTS], empty[SLOTS];
  u32 by_warp[MOST_OPERANDS][2][WARPS];  // of an operand, since warps of other blocks may be at the next one; where a block has infinity
};

__device__ __forceinline__ Place place_of(const Operands& p, u32 number) {
  const int which = (number >= (u32)p.of[0].end) + (number >= (u32)p.of[1].end);
  const Operand& o = p.of[which];
  number -= which == 0 ? 0 : p.of[which - 1].end;
  const u32 rest = number / (u32)o.heads, batch = rest / (u32)o.tiles;  // heads lie side by side in memory
  return {which, (int)batch, (int)(number - rest * o.heads), (int)((rest - batch * o.tiles) * CTA_ROWS)};
}
// The same number, of which the compiler does not know it: what is made of it is made again instead of kept.
__device__ __forceinline__ u32 anew(u32 x) {
  u32 y;
  asm volatile("mov.u32 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}
// The tiles of this CTA.
__device__ __forceinline__ int number_of(u32 turn) { return blockIdx.x + turn * gridDim.x; }
__device__ __forceinline__ Place& place_in(Shared& shared, u32 turn) { return shared.places[turn % (2 * SLOTS)]; }
// By one thread: the tile of a turn, and where it is from.
__device__ __forceinline__ void fetch(Shared& shared, const Maps& maps, u32 turn, const Place& at) {
  const u32 slot = turn % SLOTS;
  place_in(shared, turn) = at;
  mbarrier_expect(&shared.full[slot], SLOT_BYTES);
#pragma unroll 1
  for (int c = 0; c < PANELS; ++c)
    tma_load(shared.slots[slot] + c * PANEL_BYTES, maps.from[at.operand], &shared.full[slot], c * PANEL, at.row, at.head, at.batch);
}

__device__ __forceinline__ void load_16_bytes(u32 (&x)[4], u32 from) {
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3]) : "r"(from) : "memory");
}
__device__ __forceinline__ void load_words(u32 (&x)[1], u32 from) {
  asm volatile("ld.shared.u32 %0, [%1];" : "=r"(x[0]) : "r"(from) : "memory");
}
__device__ __forceinline__ void load_words(u32 (&x)[2], u32 from) {
  asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(x[0]), "=r"(x[1]) : "r"(from) : "memory");
}
__device__ __forceinline__ void store_16_bytes(u32 to, const u32 (&x)[4]) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(to), "r"(x[0]), "r"(x[1]), "r"(x[2]), "r"(x[3]) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive_often(u64* b, u32 count) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0], %1;" ::"r"(smem_address(b)), "r"(count) : "memory");
}

__device__ __forceinline__ void widen(u32 raw, float& low, float& high) {
  if constexpr (BF16) {
    low = __uint_as_float(raw << 16);
    high = __uint_as_float(raw & 0xffff0000u);
  } else {
    asm("{\n\t.reg .b16 l, h;\n\tmov.b32 {l, h}, %2;\n\tcvt.f32.f16 %0, l;\n\tcvt.f32.f16 %1, h;\n\t}" : "=f"(low), "=f"(high) : "r"(raw));
  }
}

// -- rows of columns: lane = part of a row * WARP_ROWS + row of the warp, so that eight lanes beside one another are in eight rows ------
__device__ __forceinline__ int part() { return thread_id() % 32 / WARP_ROWS; }
__device__ __forceinline__ int row_of_thread() { return thread_id() / 32 * WARP_ROWS + thread_id() % WARP_ROWS; }
// Of this thread's elements, the i-th of 8: where in the row.
__device__ __forceinline__ constexpr int column(int i) { return i * 8 / RUN * (LANES * RUN) + i * 8 % RUN; }

template <bool SIGNED> __device__ __forceinline__ void load_row(float (&x)[ELEMENTS], u32 slot, u32 signs) {
  const int row = row_of_thread();
  const u32 from = slot + row * 128 + (2 * part() ^ row % 8) * 16;
#pragma unroll
  for (int i = 0; i < ELEMENTS / 8; ++i) {
    u32 raw[4];
    load_16_bytes(raw, (from ^ column(i) % PANEL / 8 * 16) + column(i) / PANEL * PANEL_BYTES);
    if constexpr (SIGNED) {
      u32 flips[4];
      load_16_bytes(flips, signs + (column(i) + part() * RUN) * 2);
#pragma unroll
      for (int j = 0; j < 4; ++j) raw[j] ^= flips[j];
    }
#pragma unroll
    for (int j = 0; j < 4; ++j) widen(raw[j], x[8 * i + 2 * j], x[8 * i + 2 * j + 1]);
  }
}
// The pairs one apart first, as in fp8/rotation.py.
__device__ __forceinline__ void transform(float (&x)[ELEMENTS], float normaliser) {
#pragma unroll
  for (int apart = 1; apart < ELEMENTS; apart *= 2) {
    if (apart == RUN) {
#pragma unroll
      for (int lane = 1; lane < LANES; lane *= 2) {
        const float sign = part() & lane ? -1.0f : 1.0f;
#pragma unroll
        for (int i = 0; i < ELEMENTS; ++i) x[i] = __fmaf_rn(x[i], sign, __shfl_xor_sync(0xffffffffu, x[i], lane * WARP_ROWS));
      }
    }
#pragma unroll
    for (int i = 0; i < ELEMENTS; ++i) {
      if (i & apart) continue;
      const float low = x[i], high = x[i + apart];
      x[i] = low + high, x[i + apart] = low - high;
    }
  }
#pragma unroll
  for (int i = 0; i < ELEMENTS; ++i) x[i] *= normaliser;
}
__device__ __forceinline__ void store_row(const float (&x)[ELEMENTS], float inverse, u32 slot, const Team& team) {
  const int lane = lane_id(), row = team.row + lane % WARP_ROWS, of_block = row - team.first;  // not as above: nothing is kept meanwhile
  const u32 to = OUT_PANEL == 128 ? slot + row * 128 + (lane / WARP_ROWS ^ row % 8) * 16
                                  : slot + team.first * 128 + of_block * 64 + of_block / 2 % 4 * 16;
#pragma unroll
  for (int i = 0; i < ELEMENTS; i += RUN) {
    constexpr int APART = LANES * RUN;
    u32 packed[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float* y = x + i + 4 * j;
      packed[j] = pack_e4m3(y[0] * inverse, y[1] * inverse, y[2] * inverse, y[3] * inverse);
    }
    const int at = i / RUN * APART;
    store_16_bytes((to ^ at % OUT_PANEL) + at / OUT_PANEL * PANEL_BYTES, packed);
  }
}

// -- rows of keys: of key k of 32 a thread has columns x[COLUMNS k], ..; a block's threads lie along the columns first -------------
__device__ __forceinline__ int first_column(int of_block) { return of_block % (HEAD_DIM / COLUMNS) * COLUMNS; }
__device__ __forceinline__ int group_of_keys(int of_block) { return of_block / (HEAD_DIM / COLUMNS); }

__device__ __forceinline__ void load_keys(float (&x)[ELEMENTS], u32 slot, int first, int of_block) {
  const int column = first_column(of_block);
  const u32 from = slot + column / PANEL * PANEL_BYTES + (first + group_of_keys(of_block) * 32) * 128 + column % PANEL * 2;
#pragma unroll
  for (int k = 0; k < 32; ++k) {
    u32 raw[COLUMNS / 2];
    load_words(raw, (from ^ k % 8 * 16) + k * 128);
#pragma unroll
    for (int c = 0; c < COLUMNS; c += 2) widen(raw[c / 2], x[COLUMNS * k + c], x[COLUMNS * k + c + 1]);
  }
}
// Position 4 i + {0, 1, 2, 3} of sixteen is key 2 i + {0, 1, 8, 9}, as in fp8/keyed.py.
__device__ __forceinline__ void store_keys(const float (&x)[ELEMENTS], float inverse, u32 slot, int first, int of_block) {
  constexpr int PANEL_OF_KEYS = KEY_PANEL ? KEY_PANEL : 32;
  const int column = first_column(of_block), group = group_of_keys(of_block);
  const u32 region = slot + column / OUT_PANEL * PANEL_BYTES + first * 128 + group * 32 / PANEL_OF_KEYS * (OUT_PANEL * PANEL_OF_KEYS);
#pragma unroll
  for (int c = 0; c < COLUMNS; ++c) {
    const int row = column % OUT_PANEL + c;
    const u32 to = region + row * PANEL_OF_KEYS + row / (128 / PANEL_OF_KEYS) % (PANEL_OF_KEYS / 16) * 16;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      u32 packed[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float* y = x + COLUMNS * (16 * half + 2 * i) + c;
        packed[i] = pack_e4m3(y[0] * inverse, y[COLUMNS] * inverse, y[8 * COLUMNS] * inverse, y[9 * COLUMNS] * inverse);
      }
      store_16_bytes(to ^ (group * 32 % PANEL_OF_KEYS + half * 16), packed);
    }
  }
}

__device__ __forceinline__ u32 magnitude(const float (&x)[ELEMENTS], bool finite) {
  float most = 0.0f;
#pragma unroll
  for (int i = 0; i < ELEMENTS; ++i) {
    const float size = fabsf(x[i]);
    most = fmaxf(most, finite && !(size < INFINITE) ? 0.0f : size);  // NaN counts for nothing
  }
  return __float_as_uint(most);
}
// The largest of a block; bits of floats that are not negative order as integers do. A block's warps meet at a barrier of their own.
__device__ __forceinline__ u32 largest_of(u32 mine, u32* by_warp, int barrier, int first, int warps) {
  mine = __reduce_max_sync(0xffffffffu, mine);
  const int lane = threadIdx.x % 32;
  if (lane == 0) by_warp[threadIdx.x / 32] = mine;
  barrier_sync(barrier, 32 * warps);
  return __reduce_max_sync(0xffffffffu, lane < warps ? by_warp[first + lane] : 0);
}

// The largest over 448, and one over that, as divisions round them: what is given is in the range of normal numbers, or clamped to it.
__device__ __forceinline__ float step_of(u32 bits, bool powers) {
  constexpr float INVERSE = 1.0f / 448.0f;
  const float most = __uint_as_float(bits), guess = most * INVERSE;
  const float step = fmaxf(__fmaf_rn(__fmaf_rn(-448.0f, guess, most), INVERSE, guess), 1.1754944e-38f);
  return powers ? __uint_as_float((__float_as_uint(step) + 0x7fffff) & 0xff800000u) : step;
}
__device__ __forceinline__ float inverse_of(float step) {
  const float guess = reciprocal_approx(step);
  return __fmaf_rn(guess, __fmaf_rn(-step, guess, 1.0f), guess);
}

// By the first thread of a block: its e4m3 to memory, its descale.
__device__ __forceinline__ void send(const Operand& o, const TensorMap& to, const Place& at, const Team& team, u32 slot, float step) {
  const int row = at.row + team.first;
  if (row >= o.seqlen) return;
  o.descale[((long long)at.batch * o.heads + at.head) * o.blocks + (u32)row / (u32)o.block] = step;
  slot += team.first * 128;
  if (KEY_PANEL && o.keyed) {
    constexpr int PANEL_OF_KEYS = KEY_PANEL ? KEY_PANEL : 32;
#pragma unroll 1
    for (int c = 0; c < OUT_PANELS; ++c)
#pragma unroll 1
      for (int k = 0; k < o.block; k += PANEL_OF_KEYS)
        tma_store(to, slot + c * PANEL_BYTES + k * OUT_PANEL, row + k, c * OUT_PANEL, at.head, at.batch);
  } else {
#pragma unroll 1
    for (int c = 0; c < OUT_PANELS; ++c) tma_store(to, slot + c * PANEL_BYTES, c * OUT_PANEL, row, at.head, at.batch);
  }
  tma_commit();
}

// Once TMA has read the slot of the tile before: the next tile into it.
__device__ __forceinline__ void renew(Shared& shared, const Operands& p, const Maps& maps, u32 turn) {
  const u32 slot = (turn - 1) % SLOTS;
  const Team& team = shared.teams[place_in(shared, anew(turn) - 1).operand][anew(thread_id()) / 32];
  if (team.first * LANES != thread_id()) return;
  tma_wait_read();
  mbarrier_arrive_often(&shared.empty[slot], team.warps);
  if (thread_id() != 0 || number_of(turn + SLOTS - 1) >= p.count) return;
  mbarrier_wait(&shared.empty[slot], (turn - 1) / SLOTS & 1);
  fetch(shared, maps, turn + SLOTS - 1, shared.upcoming);
}

extern "C" __global__ void __launch_bounds__(THREADS, CTAS)
    attention_forward(const __grid_constant__ Maps maps, const __grid_constant__ Operands p) {
  extern __shared__ __align__(1024) unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < SLOTS; ++slot) mbarrier_init(&shared.full[slot], 1), mbarrier_init(&shared.empty[slot], WARPS);
    mbarrier_init_fence();
    for (u32 turn = 0; turn < SLOTS; ++turn)
      if (number_of(turn) < p.count) fetch(shared, maps, turn, place_of(p, number_of(turn)));
  }
#pragma unroll 1
  for (int i = threadIdx.x; i < HEAD_DIM / 2; i += THREADS) shared.signs[i] = __ldg(p.signs + i);
#pragma unroll 1
  for (int i = threadIdx.x; i < MOST_OPERANDS * WARPS; i += THREADS) {
    const int which = i / WARPS, rows = p.of[which].block, first = i % WARPS * WARP_ROWS / rows * rows;
    int barrier = 1 + first / rows;
    for (int before = 0; before < which; ++before) barrier += CTA_ROWS / p.of[before].block;
    shared.teams[which][i % WARPS] = {i % WARPS * WARP_ROWS, first, rows * LANES / 32, barrier};
  }
  __syncthreads();

  for (u32 turn = 0; number_of(turn) < p.count; ++turn) {
    const u32 slot = turn % SLOTS;
    if (thread_id() == 0 && turn > 0 && number_of(turn + SLOTS - 1) < p.count) shared.upcoming = place_of(p, number_of(turn + SLOTS - 1));
    mbarrier_wait(&shared.full[slot], turn / SLOTS & 1);
    float x[ELEMENTS];
    {
      const u32 tile = smem_address(shared.slots[slot]);
      const int operand = place_in(shared, turn).operand;
      if (KEY_PANEL && p.of[operand].keyed) {
        const int first = shared.teams[operand][thread_id() / 32].first;
        load_keys(x, tile, first, thread_id() - first * LANES);
      } else if (p.of[operand].hadamard) {
        load_row<true>(x, tile, smem_address(shared.signs));
        transform(x, p.normaliser);
      } else {
        load_row<false>(x, tile, 0);
      }
    }

    if (turn > 0) renew(shared, p, maps, turn);
    const int operand = place_in(shared, anew(turn)).operand;
    const Team& team = shared.teams[operand][anew(thread_id()) / 32];
    const int first_warp = team.first / WARP_ROWS;
    u32 bits = largest_of(magnitude(x, false), shared.by_warp[operand][0], team.barrier, first_warp, team.warps);
    if (bits == __float_as_uint(INFINITE)) {  // one that e4m3 does not have: it becomes NaN
      bits = largest_of(magnitude(x, true), shared.by_warp[operand][1], team.barrier, first_warp, team.warps);
#pragma unroll
      for (int i = 0; i < ELEMENTS; ++i) x[i] = __fmaf_rn(x[i], 0.0f, x[i]);
    }
    const float step = step_of(bits, p.of[operand].powers), inverse = inverse_of(step);
    const u32 tile = smem_address(shared.slots[anew(turn) % SLOTS]);
    const int of_block = (team.row - team.first) * LANES + lane_id();
    if (KEY_PANEL && p.of[operand].keyed)
      store_keys(x, inverse, tile, team.first, of_block);
    else
      store_row(x, inverse, tile, team);
    fence_async();
    barrier_sync(team.barrier, 32 * team.warps);
    if (of_block == 0) send(p.of[operand], maps.to[operand], place_in(shared, anew(turn)), team, tile, step);
  }
  asm volatile("cp.async.bulk.wait_group 0;" ::: "memory");
}

extern "C" {
__constant__ int attention_smem_bytes = sizeof(Shared);
}
