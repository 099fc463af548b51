// Sums on their way out, under the main loop: four warps of each CTA take what every tile of keys has added to.
#pragma once
#include "shared.cuh"

__device__ __forceinline__ int draw(int* counter) {
  int number = 0;
  if (lane_id() == 0) number = atomicAdd(counter, 1);
  return __shfl_sync(0xffffffffu, number, 0);
}
// Of the parts of sums. Where few registers are left the address is found anew each time: it depends on the lane, which is 0.
__device__ __forceinline__ int draw_part(const Params& p) {
  if constexpr (!DQ_ACROSS) return draw(&p.counters->part);
  int number = 0;
  if (lane_id() == 0) number = atomicAdd(&p.counters->part + lane_id(), 1);
  return __shfl_sync(0xffffffffu, number, 0);
}
// Past L1, which would keep what a head before has left there.
__device__ __forceinline__ float4 load_sums(const float4* from) {
  float4 x;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "l"(from) : "memory");
  return x;
}

constexpr int PARTS = SHARES;                      // of a block's sums
constexpr int KEY_PARTS = 2 * PANELS * CONSUMERS;  // of a split tile's

constexpr int WHOLE = 1 << 29;  // counted of a tile among those that are shared which a CTA has for itself: it needs no sums

// What there is to finish: of split tiles dV and dK, then dQ of head after head.
struct Part {
  const Params& p;
  int number;  // of dQ; of a split tile's where negative
  __device__ __forceinline__ Part(const Params& p, int item) : p(p), number(item - (SPLITS ? p.split * KEY_PARTS : 0)) {}
  static __device__ __forceinline__ int count(const Params& p) {
    return p.batch * p.heads * p.m_tiles * PARTS + (SPLITS ? p.split * KEY_PARTS : 0);
  }
  __device__ __forceinline__ bool of_keys() const { return SPLITS && number < 0; }
  __device__ __forceinline__ int of_split() const { return number + p.split * KEY_PARTS; }
  __device__ __forceinline__ const int* counter() const {
    return of_keys() ? p.key_added + of_split() / KEY_PARTS : p.added + number / (p.m_tiles * PARTS);
  }
  __device__ __forceinline__ int wanted() const {
    return of_keys() ? CONSUMERS * p.m_tiles * p.sharing : p.adds;
  }
};

// One warp: a part, scaled, in 16 bits; and zeros for the head that has the sums next. AT_ONCE times 1 KiB is under way.
template <int AT_ONCE> __device__ __forceinline__ void finish_part(const Params& p, const Part& of) {
  constexpr int LANES = SHARE_COLUMNS / 8, ROWS = 32 / LANES;  // 32 bytes of sums of a lane, ROWS rows of a warp
  constexpr int PART_SUMS = CHUNK / 4;
  const int lane = lane_id(), row = lane / LANES;
  const float4* from;
  unsigned char* out;
  u32 pitch;
  int left, finished = -1;
  float scale = p.scale;
  if (of.of_keys()) {
    const int part = of.of_split();
    const Tile tile = Tile::locate(part / KEY_PARTS, p);
    const int chunk = part % KEY_PARTS / CONSUMERS;  // of dV, then of dK
    const int key = tile.n * BLOCK_N + part % CONSUMERS * SHARE_ROWS + row;
    if (chunk < PANELS) scale = 1.0f;
    from = reinterpret_cast<const float4*>(p.key_sums) + (u64)(u32)part * PART_SUMS;
    pitch = (u32)p.kv_heads * (HEAD_DIM * 2);
    out = static_cast<unsigned char*>(chunk < PANELS ? p.dV : p.dK) + ((u64)(u32)tile.batch * (u32)p.seqlen_k + (u32)key) * pitch +
          (u32)tile.kv_head * (HEAD_DIM * 2) + chunk % PANELS * (SHARE_COLUMNS * 2);
    left = p.seqlen_k - key;
  } else {
    const int block = of.number / PARTS, part = of.number - block * PARTS, flat = block / p.m_tiles, m = block - flat * p.m_tiles;
    const int batch = flat / p.heads, query = m * BLOCK_M + (DQ_BY_QUERIES ? part * SHARE_ROWS : 0) + row;
    if (flat + p.ring < p.batch * p.heads) finished = flat;
    from = reinterpret_cast<const float4*>(p.sums) + ((u64)(u32)(flat % p.ring * p.m_tiles + m) * PARTS + part) * PART_SUMS;
    pitch = (u32)p.heads * (HEAD_DIM * 2);
    out = static_cast<unsigned char*>(p.dQ) + ((u64)(u32)batch * (u32)p.seqlen_q + (u32)query) * pitch +
          (u32)(flat - batch * p.heads) * (HEAD_DIM * 2) + (DQ_BY_QUERIES ? 0 : part * SHARE_COLUMNS * 2);
    left = p.seqlen_q - query;
  }
  // The 32 bytes of sums at number n of row r are those of number n xor r % 8; rows of odd steps are 4 further.
  float4* sums = const_cast<float4*>(from) + lane * 2;
  out += (lane % LANES ^ row) * 16;
#pragma unroll 1
  for (int step = 0; step < SHARE_ROWS / ROWS; step += AT_ONCE) {
    float4 x[AT_ONCE][2];
#pragma unroll
    for (int r = 0; r < AT_ONCE; ++r) x[r][0] = load_sums(sums + r * 64), x[r][1] = load_sums(sums + r * 64 + 1);
#pragma unroll
    for (int r = 0; r < AT_ONCE; ++r) {
      const float4 low = x[r][0], high = x[r][1];
      uint4 y;
      y.x = pack<BF16>(low.x * scale, low.y * scale), y.y = pack<BF16>(low.z * scale, low.w * scale);
      y.z = pack<BF16>(high.x * scale, high.y * scale), y.w = pack<BF16>(high.z * scale, high.w * scale);
      if (finished >= 0) sums[0] = sums[1] = make_float4(0.0f, 0.0f, 0.0f, 0.0f);
      if (left > 0) *reinterpret_cast<uint4*>(out) = y;
      left -= ROWS, sums += 64, out = (unsigned char*)((u64)out ^ 64) + ROWS * pitch;
    }
  }
  __syncwarp();
  if (finished >= 0 && lane == 0) count(p.finished + finished, 1);
}

// The same of a part as a warpgroup's registers held it (DQ_ACROSS): 64 of the head dim of BLOCK_M queries. 512 bytes are 16 of the head
// dim of 8 queries, which the warp turns round; AHEAD times as many are under way.
// One address for loads and stores, or there would be two.
template <int AT> __device__ __forceinline__ float4 load_sums_at(u64 from) {
  float4 x;
  asm volatile("ld.global.cg.v4.f32 {%0, %1, %2, %3}, [%4 + %5];" : "=f"(x.x), "=f"(x.y), "=f"(x.z), "=f"(x.w) : "l"(from), "n"(AT)
               : "memory");
  return x;
}
template <int AT> __device__ __forceinline__ void clear_sums_at(u64 at) {
  asm volatile("st.global.v4.f32 [%0 + %2], {%1, %1, %1, %1};" ::"l"(at), "f"(0.0f), "n"(AT) : "memory");
}
template <int AHEAD> __device__ __forceinline__ void finish_across(const Params& p, int number) {
  constexpr int UNIT = 512;
  const int lane = lane_id(), block = number / PARTS, part = number - block * PARTS, flat = block / p.m_tiles, m = block - flat * p.m_tiles;
  const int batch = flat / p.heads, query = m * BLOCK_M + lane / 4;
  const bool more = flat + p.ring < p.batch * p.heads;
  const u32 pitch = (u32)p.heads * (HEAD_DIM * 2);
  u64 sums = (u64)p.sums + ((u64)(u32)(flat % p.ring * p.m_tiles + m) * PARTS + part) * (SHARE * 4) + lane * 16;
  unsigned char* out = static_cast<unsigned char*>(p.dQ) + ((u64)(u32)batch * (u32)p.seqlen_q + (u32)query) * pitch +
                       (u32)(flat - batch * p.heads) * (HEAD_DIM * 2) + part * (SHARE_COLUMNS * 2) + lane % 4 * 4;
  int left = p.seqlen_q - query;
  float4 x[AHEAD];
#pragma unroll
  for (int r = 0; r < AHEAD; ++r) x[r] = r == 0 ? load_sums_at<0>(sums) : load_sums_at<UNIT>(sums);
  const auto turn = [&](float4 y, int w) {
    const u32 low = transposed(pack<BF16>(y.x * p.scale, y.y * p.scale)), high = transposed(pack<BF16>(y.z * p.scale, y.w * p.scale));
    u32* to = reinterpret_cast<u32*>(out + w * 32);
    if (left > 0) to[0] = low, to[4] = high;
  };
#pragma unroll 1
  for (int g = BLOCK_M / 8; g > 0; --g, left -= 8, sums += 4 * UNIT, out += 8 * pitch) {
    static_assert(AHEAD == 2, "two at a time");
    turn(x[0], 0);
    x[0] = load_sums_at<2 * UNIT>(sums);
    turn(x[1], 1);
    x[1] = load_sums_at<3 * UNIT>(sums);
    if (more) clear_sums_at<0>(sums), clear_sums_at<UNIT>(sums);
    turn(x[0], 2);
    if (g > 1) x[0] = load_sums_at<4 * UNIT>(sums);
    turn(x[1], 3);
    if (g > 1) x[1] = load_sums_at<5 * UNIT>(sums);
    if (more) clear_sums_at<2 * UNIT>(sums), clear_sums_at<3 * UNIT>(sums);
  }
  __syncwarp();
  if (more && lane_id() == 0) count(p.finished + number / PARTS / p.m_tiles, 1);
}

// A warp: part by part in order, to the end.
template <int AT_ONCE> __device__ __forceinline__ void finish_all(const Params& p) {
#pragma unroll 1
  for (int item = draw_part(p); item < Part::count(p); item = draw_part(p)) {
    const Part part(p, item);
    wait_count(part.counter(), part.wanted());
    if (part.of_keys() && count_of(part.counter()) >= WHOLE) continue;
    __syncwarp();
    if constexpr (DQ_ACROSS) {
      if (part.of_keys()) finish_part<(AT_ONCE > 2 ? AT_ONCE : 1)>(p, part);
      else finish_across<2>(p, part.number);
    } else {
      finish_part<AT_ONCE>(p, part);
    }
  }
}
