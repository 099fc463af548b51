// Head_dim 256: one warpgroup forms S and P, the other dP and dS; then each forms its half of dV, dQ and dK. The next block's S runs
// under this one's dQ and dK, and dP under the last of the block before's dQ on its way out.
#include "halves.cuh"

// P of block i and half of the head dim of all else; S of the next block, unless this is the last.
template <bool LAST> __device__ __forceinline__ void weigh(Consumer& wg, Scores& S, int i) {
  Operand P;
  Queries dQ;
  Rows rows;
  wg.load_lse(rows, i);
  wg.probabilities(S, rows, P);
  wg.put_weights(P, i);
  wg.wait_do(i);
  wg.issue_values(P, i);
  wg.wait_gradient(i);
  wg.issue_queries(dQ, 0);
  wg.issue_shared_keys(i);
  wg.wait_for<1>(dQ);
  wg.free_do(i);
  wg.put_queries(dQ, 0);
  wg.issue_queries(dQ, 1);
  wg.wait_for<0>(dQ);
  wg.free_q(i);
  if constexpr (!LAST) {
    wg.wait_q(i + 1);
    wg.issue_scores(S, i + 1);
  }
  wg.put_queries(dQ, 1);
  wg.next(i);
  if constexpr (!LAST) wg.wait_for<0>(S);
}

// dS of block i and the other half; first the last share of the block before's dQ leaves, if there is one.
template <bool FIRST> __device__ __forceinline__ void differentiate(Consumer& wg, Queries& dQ, int i) {
  Scores dP;
  Operand dS;
  wg.wait_do(i);
  wg.issue_products(dP, i);
  if constexpr (!FIRST) {
    wg.put_queries(dQ, 1);
    wg.next(i - 1);
  }
  wg.wait_weights(i);
  wg.issue_shared_values(i);
  wg.wait_for<1>(dP);
  wg.gradient(dP, dS, i);
  wg.put_gradient(dS);
  wg.wait_q(i);
  wg.issue_keys(dS, i);
  wg.wait_gradient(i);
  wg.issue_queries(dQ, 0);
  wg.wait_for<0>(dQ);
  wg.free_do(i);
  wg.free_q(i);
  wg.put_queries(dQ, 0);
  wg.issue_queries(dQ, 1);
  wg.wait_for<0>(dQ);
}

__device__ __forceinline__ void consume(Consumer& wg) {
  wg.wait_k();
  if (wg.rank == 0) {
    Scores S;
    wg.wait_q(wg.first);
    wg.issue_scores(S, wg.first);
    wg.wait_for<0>(S);
#pragma unroll 1
    for (int i = wg.first; i < wg.last; ++i) weigh<false>(wg, S, i);
    weigh<true>(wg, S, wg.last);
    wg.free_k();
    wg.store();
  } else {
    __builtin_assume(wg.rank == 1);
    Queries dQ;
    wg.wait_v();
    differentiate<true>(wg, dQ, wg.first);
#pragma unroll 1
    for (int i = wg.first + 1; i <= wg.last; ++i) differentiate<false>(wg, dQ, i);
    wg.put_queries(dQ, 1);
    wg.next(wg.last);
    wg.free_v();
    wg.free_k();
    wg.store();
  }
}

ATTENTION_BACKWARD
