// The main kernel: its warpgroups and their registers. Whoever includes it has a `Consumer`, and a `drain`, which may do nothing.
#pragma once

__device__ __forceinline__ void consume(Consumer& wg);

// What the CTA is launched with, 128 x 512 registers, dealt out anew.
constexpr int PRODUCER_REGISTERS = DQ_APART && !DQ_ACROSS ? 32 : 24, CONSUMER_REGISTERS = DQ_APART ? 208 : 232;
constexpr int LAST_REGISTERS = DQ_ACROSS ? 72 : DQ_APART ? 64 : 24;

__device__ __forceinline__ void attention(const Problem& problem) {
  extern __shared__ __align__(1024) unsigned char memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  const int warpgroup = uniform(threadIdx.x / WARPGROUP);
  if (threadIdx.x == 0) {
    tma_prefetch(problem.q), tma_prefetch(problem.k), tma_prefetch(problem.v), tma_prefetch(problem.dO);
    tma_prefetch(problem.dK), tma_prefetch(problem.dV), tma_prefetch(problem.statistics);
    shared.init();
  }
  __syncthreads();
  if (warpgroup == 0) {
    fewer_registers<PRODUCER_REGISTERS>();
    const int warp = uniform(thread_id() / 32);
    if (warp <= DRAINS) {
      if (elected()) {
        if (warp == 0) Producer{shared, problem}.run();
        else drain(shared, problem, DRAINS == 1 && DQ_ACROSS ? 0 : warp - 1);
      }
    } else if (DQ_APART) {
      finish_all<2>(problem.p);
    }
  } else if (warpgroup > CONSUMERS) {
    fewer_registers<LAST_REGISTERS>();
#if DQ_APART
    QueryGradients{shared, problem}.run();
#endif
    finish_all<DQ_APART ? 4 : 1>(problem.p);
  } else {
    more_registers<CONSUMER_REGISTERS>();
    Consumer wg(shared, problem, uniform(thread_id() / WARPGROUP) - 1);  // anew: what is kept from the entry on is spilled
    for (; wg.begin(); wg.end()) consume(wg);
    if (lane_id() == 0) tma_wait_read();  // shared memory must outlive the copies from it
    __syncwarp();
    finish_all<8>(problem.p);
  }
}

extern "C" {
__constant__ int attention_smem_bytes = sizeof(Shared);
}

#define ATTENTION_BACKWARD                                                                                                           \
  extern "C" __global__ void __launch_bounds__(THREADS, 1)                                                                           \
      attention_backward(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v, \
                         const __grid_constant__ TensorMap dO, const __grid_constant__ TensorMap dK, const __grid_constant__ TensorMap dV, \
                         const __grid_constant__ TensorMap statistics, const __grid_constant__ Params p) {                           \
    attention(Problem{q, k, v, dO, dK, dV, statistics, p});                                                                          \
  }
