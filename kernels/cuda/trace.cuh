// The in-kernel trace: one thread of each warpgroup stores the clock at each event, in the slot of its K/V block and label. There
// is no cursor to move and nothing to pack: a stamp is two instructions, the clock and a store of 32 bits at a constant offset.
// Without TRACE nothing is left of it.
#pragma once
#include "ptx.cuh"

// OPEN and CLOSE are the turn taken before a tile's first block and given after its last, where the block has another TAKE or GIVE.
enum class Label : u32 { LOAD_Q, LOAD_K, LOAD_V, SCORES, SCORES_DONE, VALUES, VALUES_DONE, SOFTMAX, STORE, TAKE, GIVE, OPEN, CLOSE };
constexpr int TRACE_SLOTS = 16;     // of a block, by label
constexpr int TRACE_BLOCKS = 1024;  // of a row; a tile that ends past them is not stamped
constexpr int TRACE_ROWS = 4;       // the producer, then up to three consumers

#if TRACE
struct Trace {
  u64 at;         // address of the slots of `block`
  int block = 0;  // follows the walk outside the turns, so that a stamp's distance from it is known to the compiler
  bool on = false;
  u32 now = 0;

  // Each lane fetches the address from itself, and but lane 0 drops it: or ptxas would take it for the same in the whole warp, keep
  // it in uniform registers, and find it anew at every stamp.
  __device__ __forceinline__ Trace(u32* buffer, int row) {
    const u64 address = (u64)(buffer + (blockIdx.x * TRACE_ROWS + row) * (TRACE_BLOCKS * TRACE_SLOTS));
    at = (u64)__shfl_sync(0xffffffffu, (u32)(address >> 32), lane_id()) << 32 | __shfl_sync(0xffffffffu, (u32)address, lane_id());
    if (thread_id() % 32 != 0) at = 0;
  }
  // A tile of the blocks `first` to `last`, numbered over the kernel's life. Consumer r stamps from its warp r: the schedulers share.
  __device__ __forceinline__ void begin(int first, int last) {
    on = thread_id() % 128 == (thread_id() < 128 ? 0 : thread_id() / 128 * 32 - 32) && first <= last && last < TRACE_BLOCKS;
    seek(first);
  }
  __device__ __forceinline__ void seek(int to) {
    at += (to - block) * (TRACE_SLOTS * 4);
    block = to;
    asm volatile("" : "+l"(at));
  }
  __device__ __forceinline__ void stamp(Label label, int j) {
    asm volatile("{\n\t.reg .pred on;\n\tsetp.ne.s32 on, %2, 0;\n\t@on mov.u32 %0, %%clock;\n\t@on st.global.u32 [%1], %0;\n\t}"
                 : "+r"(now)
                 : "l"(at + (j - block) * (TRACE_SLOTS * 4) + (u32)label * 4), "r"((int)on));
  }
};
#else
struct Trace {
  __device__ __forceinline__ Trace(u32*, int) {}
  __device__ __forceinline__ void begin(int, int) {}
  __device__ __forceinline__ void seek(int) {}
  __device__ __forceinline__ void stamp(Label, int) {}
};
#endif
