// Chains of dependent instructions: what a warp does before a GEMM, a TMA copy or the next tile.
constexpr int UNROLL = 16;

// A loop of UNROLL copies of BODY on `x`; cycles of the whole loop, one number per warp.
#define CHAIN(NAME, BODY)                                                                        \
  extern "C" __global__ void __launch_bounds__(128, 1) NAME(u32* out, long long reps, u32 a, u32 b) { \
    __shared__ u32 table[32];                                                                    \
    __shared__ u64 phase;                                                                        \
    if (threadIdx.x < 32) table[threadIdx.x] = smem_address(table);                              \
    if (threadIdx.x == 0) mbarrier_init(&phase, 1);                                              \
    __syncthreads();                                                                             \
    u32 x = b ? a : smem_address(table);                                                         \
    BODY /* warm */                                                                              \
    u32 start = clock_now();                                                                     \
    _Pragma("unroll 1") for (int i = 0; i < (int)reps; ++i) {                                    \
      _Pragma("unroll") for (int k = 0; k < UNROLL; ++k) { BODY }                                \
    }                                                                                            \
    if (x == 0x12345678u + b * 77u) out[0] = x;                                                  \
    u32 stop = clock_now();                                                                      \
    if (threadIdx.x % 32 == 0) out[blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32] = stop - start; \
  }

// Falls out of the chain where a lane disagrees, which never happens.
#define UNLESS(CONDITION) if (!(CONDITION)) { _Pragma("unroll 1") for (u32 n = 0; n < a; ++n) out[x + n] = x; }

CHAIN(multiply, asm volatile("mad.lo.u32 %0, %0, %1, %2;" : "+r"(x) : "r"(b), "r"(a));)
CHAIN(add_xor, x = (x + b) ^ a;)
CHAIN(shared_load, asm volatile("ld.shared.u32 %0, [%0];" : "+r"(x) :: "memory");)
CHAIN(elect_branch, { u32 d; asm volatile("{ .reg .pred p; elect.sync _|p, 0xffffffff; selp.u32 %0, 1, 0, p; }" : "=r"(d) : "r"(x)); x += b; if (d) asm volatile("st.shared.u32 [%0], %1;" :: "r"(smem_address(table)), "r"(x) : "memory"); __syncwarp(); })
CHAIN(ballot, asm volatile("{ .reg .pred p; setp.ne.u32 p, %0, 0; vote.sync.ballot.b32 %0, p, 0xffffffff; }" : "+r"(x));)
CHAIN(compare_branch, { x += b; UNLESS(x != 0x7fffffffu) })
CHAIN(vote_branch, { x += b; UNLESS(__all_sync(0xffffffffu, x != 0x7fffffffu)) })
CHAIN(divide, asm volatile("div.u32 %0, %1, %0;" : "+r"(x) : "r"(a)); x |= 1;)
CHAIN(reduce_add, x = __reduce_or_sync(0xffffffffu, x) + b;)
CHAIN(fence_proxy, asm volatile("fence.proxy.async.shared::cta;" ::: "memory");)
CHAIN(store_fence_proxy, { asm volatile("st.shared.u32 [%0], %1;" :: "r"(smem_address(table) + threadIdx.x % 32 * 4), "r"(x) : "memory"); asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); })
CHAIN(barrier, bar_sync(1, 128);)
CHAIN(warp_sync, __syncwarp();)
CHAIN(barrier_ready, { u32 d = mbarrier_try(&phase, 1); UNLESS(d) })

// Draws from a queue in global memory, each waiting for the last; `alone`: the one CTA that draws, or -1 for all at once.
extern "C" __global__ void draws(u32* out, u32* queue, long long reps, long long alone) {
  if (threadIdx.x || (alone >= 0 && (int)alone != (int)blockIdx.x)) return;
  u64 now = nanoseconds();
  if (alone < 0) {
    u64 target = (now / 65536 + 2) * 65536;
    while (nanoseconds() < target) {}
  }
  u32 ticket = 0;
  for (int i = 0; i < (int)reps; ++i) {
    u32 start = clock_now();
    ticket = atomicAdd(queue + (ticket >> 31), 1u);
    if (ticket == 0xffffffffu) queue[1] = 1;
    out[blockIdx.x * reps + i] = clock_now() - start;
  }
}
