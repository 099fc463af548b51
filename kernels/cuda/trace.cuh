// The in-kernel trace: one thread of each warpgroup stamps (clock, label, step) into its own row of a buffer in memory.
// Without TRACE nothing is left of it.
#pragma once
#include "ptx.cuh"

enum class Label : u32 { LOAD_Q, LOAD_K, LOAD_V, SCORES, SCORES_DONE, VALUES, VALUES_DONE, SOFTMAX, STORE, TAKE, GIVE };
constexpr int TRACE_CAPACITY = 4096;  // stamps of one warpgroup; later ones are dropped
constexpr int TRACE_ROWS = 4;         // the producer, then up to three consumers

#if TRACE
struct Trace {
  u64 *next, *end;

  __device__ __forceinline__ Trace(u64* buffer, int row) {
    next = buffer + ((u64)blockIdx.x * TRACE_ROWS + row) * TRACE_CAPACITY;
    end = next + TRACE_CAPACITY;
    if (threadIdx.x % 128 != 0) next = end;
  }
  // clock (low 32 bits), label (8), step (24)
  __device__ __forceinline__ void stamp(Label label, int step) {
    if (next == end) return;
    u32 now;
    asm volatile("mov.u32 %0, %%clock;" : "=r"(now)::"memory");
    *next++ = (u64)now | (u64)label << 32 | (u64)(u32)step << 40;
  }
};
#else
struct Trace {
  __device__ __forceinline__ Trace(u64*, int) {}
  __device__ __forceinline__ void stamp(Label, int) {}
};
#endif
