// The PTX that only the backward uses, one wrapper each: loads of statistics, bulk adds of dQ, transposed stores of fragments.
#pragma once
#include "ptx.cuh"

// A box of a matrix at (column, row) into shared memory; its bytes count on `full`.
__device__ __forceinline__ void tma_load_row(void* to, const TensorMap& map, u64* full, int column, int row) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
                   smem_address(to)),
               "l"(&map), "r"(smem_address(full)), "r"(column), "r"(row)
               : "memory");
}
// fp32 of shared memory added to memory.
__device__ __forceinline__ void bulk_add(float* to, const void* from, u32 bytes) {
  asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;" ::"l"(to), "r"(smem_address(from)),
               "r"(bytes)
               : "memory");
}
// Until all but the last PENDING groups of this thread's bulk copies have been read.
template <int PENDING> __device__ __forceinline__ void bulk_wait_read_but() {
  asm volatile("cp.async.bulk.wait_group.read %0;" ::"n"(PENDING) : "memory");
}
// Until this thread's bulk copies are whole, not only read.
__device__ __forceinline__ void bulk_wait() { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

// As store_matrices, each matrix transposed: row i % 8 of matrix i / 8, which lane i points at, takes a column of the fragment.
__device__ __forceinline__ void store_transposed(u32 row_address, u32 a, u32 b, u32 c, u32 d) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(row_address), "r"(a), "r"(b), "r"(c), "r"(d)
               : "memory");
}
// Four 8 x 8 matrices of 16-bit values as fragments; lane i gives the address of row i % 8 of matrix i / 8.
__device__ __forceinline__ void load_matrices(u32 row_address, u32& a, u32& b, u32& c, u32& d) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];" : "=r"(a), "=r"(b), "=r"(c), "=r"(d) : "r"(row_address)
               : "memory");
}
// An 8 x 8 matrix of 16-bit values, a fragment of a warp, transposed.
__device__ __forceinline__ u32 transposed(u32 x) {
  u32 y;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}
__device__ __forceinline__ void store_four(u32 address, const float* x) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(x[0]), "f"(x[1]), "f"(x[2]), "f"(x[3]) : "memory");
}
__device__ __forceinline__ void store_pair(u32 address, float low, float high) {
  asm volatile("st.shared.v2.f32 [%0], {%1, %2};" ::"r"(address), "f"(low), "f"(high) : "memory");
}
__device__ __forceinline__ void add_pair(float* to, float low, float high) {
  asm volatile("red.global.add.v2.f32 [%0], {%1, %2};" ::"l"(to), "f"(low), "f"(high) : "memory");
}
__device__ __forceinline__ void load_pairs(u32 address, float2& low, float2& high) {
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(low.x), "=f"(low.y), "=f"(high.x), "=f"(high.y) : "r"(address)
               : "memory");
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
__device__ __forceinline__ void count(int* counter, int more) {
  asm volatile("fence.proxy.async;" ::: "memory");
  asm volatile("red.release.gpu.global.add.s32 [%0], %1;" ::"l"(counter), "r"(more) : "memory");
}
__device__ __forceinline__ void wait_turn(const int* turns, int turn) {
  while (count_of(turns) != turn) {}
  asm volatile("fence.proxy.async;" ::: "memory");
}
