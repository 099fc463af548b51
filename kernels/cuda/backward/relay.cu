// Head_dim 256 by three warpgroups, each handing on to the next: S, P and dV; dP, dS and dK; dQ. Two that have 64 keys of one gradient
// in their registers, all of the head dim, form no GEMM twice, and what each multiplies out is in its own registers already.
#define DQ_APART 1
#include "relay.cuh"

// P of a block, handed on, and dV.
__device__ __forceinline__ void weigh(Consumer& wg, int i) {
  Scores S;
  Operand P;
  Rows rows;
  const bool started = i > wg.first;
  wg.issue_scores(S, i);
  wg.load_rows(rows, wg.shared.lse2[i % STAGES]);
  wg.wait_for<0>(S);
  wg.probabilities(S, rows, P);
  wg.free_q(i);
  wg.put_weights(P, i);
  wg.issue_values(P, i, started);
  wg.wait_sum<0>();
  wg.free_do(i);
}

// dS of a block, handed on, and dK.
__device__ __forceinline__ void differentiate(Consumer& wg, int i) {
  Scores dP;
  Operand dS;
  const bool started = i > wg.first;
  wg.issue_products(dP, i);
  wg.wait_weights(i);
  wg.wait_for<0>(dP);
  wg.gradient(dP, dS, i);
  wg.free_do(i);
  wg.put_gradient(dS, i);
  wg.issue_keys(dS, i, started);
  wg.wait_sum<0>();
  wg.free_q(i);
}

__device__ __forceinline__ void consume(Consumer& wg) {
  if (wg.rank == 0) {
    wg.wait_k();
#pragma unroll 1
    for (int i = wg.first; i <= wg.last; ++i) weigh(wg, i);
    wg.free_k();
    wg.store_values();
  } else {
    wg.wait_v();
#pragma unroll 1
    for (int i = wg.first; i <= wg.last; ++i) differentiate(wg, i);
    wg.free_v();
    wg.store_keys();
  }
}

#include "entry.cuh"
ATTENTION_BACKWARD
