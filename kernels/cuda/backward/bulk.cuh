// The PTX that only the backward uses, one wrapper each: bulk copies of statistics and of dQ, transposed stores of fragments.
#pragma once
#include "ptx.cuh"

// Contiguous bytes into shared memory; they count on `full`.
__device__ __forceinline__ void bulk_load(void* to, const void* from, u32 bytes, u64* full) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(smem_address(to)),
               "l"(from), "r"(bytes), "r"(smem_address(full))
               : "memory");
}
// fp32 of shared memory added to memory.
__device__ __forceinline__ void bulk_add(float* to, const void* from, u32 bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to), "r"(smem_address(from)),
               "r"(bytes)
               : "memory");
}
// Until this thread's bulk copies are whole, not only read.
__device__ __forceinline__ void bulk_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// As store_matrices, each matrix transposed: row i % 8 of matrix i / 8, which lane i points at, takes a column of the fragment.
__device__ __forceinline__ void store_transposed(u32 row_address, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row_address), "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}
__device__ __forceinline__ void store_pair(u32 address, float low, float high) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(low), "f"(high) : "memory");
}
__device__ __forceinline__ float2 load_pair(u32 address) {
  float2 x;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];" : "=f"(x.x), "=f"(x.y) : "r"(address) : "memory");
  return x;
}

// -- counters in global memory, by which CTAs wait for one another's bulk copies and stores -----------------------------------
__device__ __forceinline__ int count_of(const int* counter) {
  int now;
  asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(counter) : "memory");
  return now;
}
__device__ __forceinline__ void wait_count(const int* counter, int reached) {
  while (count_of(counter) < reached) __nanosleep(64);
  asm volatile("fence.proxy.async;" ::: "memory");
}
__device__ __forceinline__ void count(int* counter) {
  asm volatile("fence.proxy.async;" ::: "memory");
  asm volatile("red.release.gpu.global.add.s32 [%0], 1;" ::"l"(counter) : "memory");
}
__device__ __forceinline__ void wait_turn(const int* turns, int turn) {
  while (count_of(turns) != turn) {}
  asm volatile("fence.proxy.async;" ::: "memory");
}
__device__ __forceinline__ void pass_turn(int* turns, int turn) {
  asm volatile("fence.proxy.async;" ::: "memory");
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(turns), "r"(turn) : "memory");
}
