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
__device__ __forceinline__ void store_floats(u32 address, const float* x) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]) : "memory");
}

// -- turns in global memory: key tile number `turn` adds next -------------------------------------------------------------
__device__ __forceinline__ void wait_turn(const int* turns, int turn) {
  int now;
  do asm volatile("ld.acquire.gpu.global.s32 %0, [%1];" : "=r"(now) : "l"(turns) : "memory");
  while (now != turn);
  asm volatile("fence.proxy.async;" ::: "memory");
}
__device__ __forceinline__ void pass_turn(int* turns, int turn) {
  asm volatile("fence.proxy.async;" ::: "memory");
  asm volatile("st.release.gpu.global.s32 [%0], %1;" ::"l"(turns), "r"(turn) : "memory");
}
