// The verbs of simulator/verbs.py on the hardware: rings of buffers filled by TMA, and the turn that warpgroups pass on.
// All phase arithmetic is here.
#pragma once
#include "ptx.cuh"

// `COUNT` buffers; load number j, counted over the kernel's whole life, uses buffer j % COUNT for the (j / COUNT)-th time.
template <int COUNT> struct Ring {
  u64 full[COUNT], empty[COUNT];

  __device__ __forceinline__ void init(int frees) {
    for (int i = 0; i < COUNT; ++i) {
      mbarrier_init(&full[i], 1);
      mbarrier_init(&empty[i], frees);
    }
  }

  // Producer: wait until load j's buffer is free; then say how many bytes will count on `full_of(j)`.
  __device__ __forceinline__ void wait_free(int j) { mbarrier_wait(&empty[j % COUNT], ((j / COUNT) & 1) ^ 1); }
  __device__ __forceinline__ u64* full_of(int j) { return &full[j % COUNT]; }
  // Consumer: wait until load j has arrived.
  __device__ __forceinline__ void wait(int j) { mbarrier_wait(&full[j % COUNT], (j / COUNT) & 1); }

  // Consumer: this warp no longer reads load j, in any CTA of the cluster that shares the buffer's loads.
  template <int CTAS> __device__ __forceinline__ void free(int j) {
    if constexpr (CTAS == 1) {
      if (lane_id() == 0) mbarrier_arrive(&empty[j % COUNT]);
    } else {
      if (lane_id() < CTAS) mbarrier_arrive_at(&empty[j % COUNT], lane_id());
    }
  }
};

// Named barriers: 0 is __syncthreads, then one turn per consumer warpgroup.
constexpr int TURN_BARRIER = 1;
constexpr int WARPGROUP = 128;

// Consumer warpgroups pass the tensor cores round; warpgroup 0 has the first turn.
struct Baton {
  int rank;
  __device__ __forceinline__ void start() const {
    if (rank == CONSUMERS - 1) give();
  }
  __device__ __forceinline__ void take() const { barrier_sync(TURN_BARRIER + rank, 2 * WARPGROUP); }
  __device__ __forceinline__ void give() const { barrier_arrive(TURN_BARRIER + (rank + 1 == CONSUMERS ? 0 : rank + 1), 2 * WARPGROUP); }
};
