"""CUDA text that the benchmarks share: clocks, barriers, TMA, and WGMMA wrappers of any width."""

PRELUDE = r"""
typedef unsigned int u32;
typedef unsigned long long u64;
typedef unsigned short u16;

__device__ __forceinline__ u32 clock_now() {
  u32 t;
  asm volatile("mov.u32 %0, %%clock;" : "=r"(t) :: "memory");
  return t;
}
__device__ __forceinline__ u64 clock_wide() {
  u64 t;
  asm volatile("mov.u64 %0, %%clock64;" : "=l"(t) :: "memory");
  return t;
}
__device__ __forceinline__ u64 nanoseconds() {
  u64 t;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(t) :: "memory");
  return t;
}
__device__ __forceinline__ u32 sm_id() { u32 i; asm volatile("mov.u32 %0, %%smid;" : "=r"(i)); return i; }
__device__ __forceinline__ u32 smem_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ u32 hash(u32 x) {
  x ^= x >> 16; x *= 0x7feb352du; x ^= x >> 15;
  x *= 0x846ca68bu; return x ^ (x >> 16);
}

__device__ __forceinline__ void bar_sync(int id, int threads) {
  asm volatile("bar.sync %0, %1;" :: "r"(id), "r"(threads) : "memory");
}
__device__ __forceinline__ void bar_arrive(int id, int threads) {
  asm volatile("bar.arrive %0, %1;" :: "r"(id), "r"(threads) : "memory");
}

__device__ __forceinline__ void mbarrier_init(u64* b, u32 count) {
  asm volatile("mbarrier.init.shared.b64 [%0], %1;" :: "r"(smem_address(b)), "r"(count) : "memory");
}
__device__ __forceinline__ void mbarrier_arrive(u64* b) {
  asm volatile("mbarrier.arrive.shared.b64 _, [%0];" :: "r"(smem_address(b)) : "memory");
}
__device__ __forceinline__ void mbarrier_expect(u64* b, u32 bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared.b64 _, [%0], %1;" :: "r"(smem_address(b)), "r"(bytes) : "memory");
}
__device__ __forceinline__ u32 mbarrier_try(u64* b, u32 phase) {
  u32 done;
  asm volatile("{ .reg .pred p; mbarrier.try_wait.parity.shared.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
               : "=r"(done) : "r"(smem_address(b)), "r"(phase) : "memory");
  return done;
}
__device__ __forceinline__ void mbarrier_wait(u64* b, u32 phase) { while (!mbarrier_try(b, phase)) {} }
__device__ __forceinline__ void fence_init() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
__device__ __forceinline__ void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

__device__ __forceinline__ void tma_load(void* to, const void* map, u64* b, int col, int row) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
               "[%0], [%1, {%3, %4}], [%2];"
               :: "r"(smem_address(to)), "l"(map), "r"(smem_address(b)), "r"(col), "r"(row) : "memory");
}
__device__ __forceinline__ void tma_store(const void* map, const void* from, int col, int row) {
  asm volatile("cp.async.bulk.tensor.2d.global.shared::cta.tile.bulk_group [%0, {%2, %3}], [%1];"
               :: "l"(map), "r"(smem_address(from)), "r"(col), "r"(row) : "memory");
}
__device__ __forceinline__ void tma_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
__device__ __forceinline__ void tma_wait_read() { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
__device__ __forceinline__ void tma_wait_written() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int N> __device__ __forceinline__ void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::
"n"(N) : "memory"); }

// Shared-memory matrix descriptor, 128-byte swizzle (PTX ISA, "Matrix descriptor format").
__device__ __forceinline__ u64 descriptor(const void* tile, u32 leading_bytes, u32 stride_bytes) {
  u64 start = (smem_address(tile) & 0x3ffff) >> 4;
  return start | ((u64)(leading_bytes >> 4) << 16) | ((u64)(stride_bytes >> 4) << 32) | (1ull << 62);
}

// Spread random bits over shared memory as fp16 values of about normal distribution.
__device__ __forceinline__ void fill_normal(unsigned char* smem, int bytes, u32 seed) {
  for (int i = threadIdx.x; i < bytes / 2; i += blockDim.x) {
    u32 h = hash(seed + i * 2654435761u);
    float sum = (float)(h & 255) + (float)((h >> 8) & 255) + (float)((h >> 16) & 255) + (float)(h >> 24);
    float x = (sum - 510.0f) * (1.0f / 148.0f);
    u16 half; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(x));
    ((u16*)smem)[i] = half;
  }
  fence_async();
  __syncthreads();
}
"""


def wgmma_wrapper(n, eight_bit=False):
    """`Wgmma<n>::ss` and `::rs`: wgmma.m64n{n}k16, fp16 operands, fp32 accumulators in n / 2 registers; or k32, e4m3.

    ss: A and B from shared memory, both K-major (as S = Q K^T).
    rs: A from four registers, B from shared memory, MN-major (as O += P V), in 8 bits K-major, the only way it has.
    """
    count = n // 2
    shape = f"m64n{n}k32.f32.e4m3.e4m3" if eight_bit else f"m64n{n}k16.f32.f16.f16"
    from_shared, from_registers = ("1, 1", "1, 1") if eight_bit else ("1, 1, 0, 0", "1, 1, 1")
    accumulators = ", ".join(f"%{i}" for i in range(count))
    outputs = ", ".join(f'"+f"(d[{i}])' for i in range(count))

    def body(a, inputs, operands, tail):
        b, scale = count + operands, count + operands + 1
        return f"""
    asm volatile("{{ .reg .pred p; setp.ne.b32 p, %{scale}, 0; "
      "wgmma.mma_async.sync.aligned.{shape} {{{accumulators}}}, {a}, %{b}, p, {tail}; }}"
      : {outputs} : {inputs}, "l"(b), "r"(accumulate) : "memory");"""

    registers = "{" + ", ".join(f"%{count + i}" for i in range(4)) + "}"
    return f"""
template <> struct Wgmma<{n}> {{
  static __device__ __forceinline__ void ss(float* d, u64 a, u64 b, int accumulate) {{
{body(f"%{count}", '"l"(a)', 1, from_shared)}
  }}
  static __device__ __forceinline__ void rs(float* d, const u32* a, u64 b, int accumulate) {{
{body(registers, '"r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3])', 4, from_registers)}
  }}
}};
"""


def wgmma_wrappers(widths, eight_bit=False):
    """The wrappers for every n in `widths`, and the primary template."""
    return "template <int N> struct Wgmma;\n" + "".join(wgmma_wrapper(n, eight_bit) for n in sorted(set(widths)))
