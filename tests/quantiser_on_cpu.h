// What cuda/fp8/quantise.cu needs to run on a CPU: a CTA of threads that meet at barriers, shared memory with mbarriers, and TMA with
// its swizzles and its zeros past the end. It takes the place of ptx_fp8.cuh; test_fp8_quantiser_text.py compiles and drives it.
#include <barrier>
#include <cmath>
#include <condition_variable>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#define __device__
#define __constant__
#define __forceinline__ inline
#define __launch_bounds__(threads, ctas)
#define __grid_constant__

typedef uint32_t u32;
typedef unsigned long long u64;
struct Index {
  int x;
};
thread_local Index threadIdx;
Index blockIdx, gridDim;
unsigned char* shared_memory;
int cta_threads;

inline void wrong(const char* what) {
  std::fprintf(stderr, "%s\n", what);
  std::abort();
}
template <class To, class From> To bits(From x) {
  To y;
  std::memcpy(&y, &x, sizeof y);
  return y;
}
inline float __int_as_float(int x) { return bits<float>(x); }
inline float __uint_as_float(u32 x) { return bits<float>(x); }
inline u32 __float_as_uint(float x) { return bits<u32>(x); }
inline float __fmaf_rn(float a, float b, float c) { return fmaf(a, b, c); }
inline float reciprocal_approx(float x) { return 1.0f / x; }
template <class T> T __ldg(const T* p) { return *p; }
inline u32 smem_address(const void* p) { return (u32)((const unsigned char*)p - shared_memory); }
inline int thread_id() { return threadIdx.x; }
inline int lane_id() { return threadIdx.x % 32; }

// -- warps and barriers ----------------------------------------------------------------------------------------------
struct Warp {
  std::barrier<> meet{32};
  u32 given[32];
};
std::vector<std::unique_ptr<Warp>> the_warps;
inline float __shfl_xor_sync(u32, float x, int mask) {
  Warp& warp = *the_warps[threadIdx.x / 32];
  warp.given[lane_id()] = bits<u32>(x);
  warp.meet.arrive_and_wait();
  const u32 other = warp.given[lane_id() ^ mask];
  warp.meet.arrive_and_wait();
  return bits<float>(other);
}
inline u32 __reduce_max_sync(u32, u32 x) {
  Warp& warp = *the_warps[threadIdx.x / 32];
  warp.given[lane_id()] = x;
  warp.meet.arrive_and_wait();
  u32 most = 0;
  for (u32 each : warp.given) most = each > most ? each : most;
  warp.meet.arrive_and_wait();
  return most;
}
struct Named {
  std::mutex lock;
  std::condition_variable changed;
  int here = 0;
  u32 times = 0;
} named[16];
inline void barrier_sync(int id, int threads) {
  Named& b = named[id];
  std::unique_lock<std::mutex> held(b.lock);
  const u32 before = b.times;
  if (++b.here == threads)
    b.here = 0, ++b.times, b.changed.notify_all();
  else
    b.changed.wait(held, [&] { return b.times != before; });
}
inline void __syncthreads() { barrier_sync(0, cta_threads); }

struct Counted {
  int arrivals, pending;
  long bytes = 0;
  u32 phase = 0;
};
std::mutex counting;
std::condition_variable counted;
std::map<u64*, Counted> mbarriers;
inline void settle(Counted& b) {
  if (b.pending < 0) wrong("an mbarrier has more arrivals than it was made for");
  if (b.pending == 0 && b.bytes == 0) b.phase ^= 1, b.pending = b.arrivals, counted.notify_all();
}
inline void mbarrier_init(u64* p, u32 n) { mbarriers[p] = Counted{(int)n, (int)n}; }
inline void mbarrier_init_fence() {}
inline void count(u64* p, int arrivals, long bytes) {
  std::lock_guard<std::mutex> held(counting);
  Counted& b = mbarriers[p];
  b.pending -= arrivals, b.bytes += bytes;
  settle(b);
}
inline void mbarrier_expect(u64* p, u32 bytes) { count(p, 1, bytes); }
inline void mbarrier_arrive_often(u64* p, u32 n) { count(p, n, 0); }
inline void mbarrier_wait(u64* p, u32 parity) {
  std::unique_lock<std::mutex> held(counting);
  counted.wait(held, [&] { return mbarriers[p].phase != parity; });
}

// -- TMA: sizes and box in elements, strides in bytes ------------------------------------------------------------------
struct alignas(64) TensorMap {
  unsigned char* at;
  long sizes[4], strides[4];
  int box[2], bytes;
};
inline unsigned char* swizzled(long at, int row_bytes) {
  const int by = row_bytes == 128 ? at >> 7 & 7 : row_bytes == 64 ? at >> 7 & 3 : row_bytes == 32 ? at >> 7 & 1 : 0;
  return shared_memory + (at ^ by << 4);
}
template <class Move> void walk(const TensorMap& m, u32 from, int column, int row, int head, int batch, Move move) {
  if (from % 128) wrong("TMA of an address that is no multiple of 128");
  const int row_bytes = m.box[0] * m.bytes;
  for (int r = 0; r < m.box[1]; ++r)
    for (int c = 0; c < m.box[0]; ++c) {
      const bool inside = column + c < m.sizes[0] && row + r < m.sizes[1] && head < m.sizes[2] && batch < m.sizes[3];
      unsigned char* far = m.at + (column + c) * m.bytes + (row + r) * m.strides[1] + head * m.strides[2] + batch * m.strides[3];
      move(swizzled(from + (long)r * row_bytes + c * m.bytes, row_bytes), inside ? far : nullptr);
    }
}
inline void tma_load(void* to, const TensorMap& m, u64* full, int column, int row, int head, int batch) {
  walk(m, smem_address(to), column, row, head, batch, [&](unsigned char* near, unsigned char* far) {
    far ? std::memcpy(near, far, m.bytes) : std::memset(near, 0, m.bytes);
  });
  count(full, 0, -(long)m.box[0] * m.bytes * m.box[1]);
}
inline void tma_store(const TensorMap& m, u32 from, int column, int row, int head, int batch) {
  walk(m, from, column, row, head, batch, [&](unsigned char* near, unsigned char* far) {
    if (far) std::memcpy(far, near, m.bytes);
  });
}
inline void tma_commit() {}
inline void tma_wait_read() {}
inline void fence_async() {}

// -- instructions ------------------------------------------------------------------------------------------------------
inline u32 e4m3(float x) {
  if (x != x) return 0x7f;
  const u32 sign = bits<u32>(x) >> 24 & 0x80;
  const float size = fminf(fabsf(x), 448.0f);
  if (size < 0.015625f) return sign | (u32)nearbyintf(size * 512.0f);
  const u32 raw = bits<u32>(size);
  return sign | ((raw + 0x7ffff + (raw >> 20 & 1)) >> 20) - (120 << 3);
}
inline u32 pack_e4m3(float a, float b, float c, float d) { return e4m3(a) | e4m3(b) << 8 | e4m3(c) << 16 | e4m3(d) << 24; }
template <int N> void load_words(u32 (&x)[N], u32 from) {
  if (from % (4 * N)) wrong("a load of an address that is no multiple of its size");
  std::memcpy(x, shared_memory + from, 4 * N);
}
inline void load_16_bytes(u32 (&x)[4], u32 from) { load_words(x, from); }
inline void store_16_bytes(u32 to, const u32 (&x)[4]) {
  if (to % 16) wrong("a store to an address that is no multiple of 16");
  std::memcpy(shared_memory + to, x, 16);
}
