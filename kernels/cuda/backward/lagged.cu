// dQ a block behind: beside fa3.cu, a block's dQ is formed with the next block's scores, under its exponentials, so that no warpgroup
// waits for the other's dS; the two drift half a block apart. dV is under the writing of dS, dQ's way out under dP and dV.
#include "gradients.cuh"

// Block i, whose S is in flight or about to be; dQ of the block before.
__device__ __forceinline__ void step(Consumer& wg, int i, Operand& dS) {
  Scores S, dP;
  Operand P;
  Queries dQ;
  wg.issue_scores(S, i);
  wg.wait_gradients(i - 1);
  wg.issue_queries(dQ, i - 1);
  wait_for<1>(S);
  wg.probabilities(S, i);
  wg.weights(S, P);
  if constexpr (HEAD_DIM == 64) pin(P);
  wg.issue_products(dP, i);
  wg.issue_values(P, i);
  wait_for<2>(dQ);
  wg.put_queries(dQ, i - 1);
  wait_for<1>(dP);
  wg.gradient(P, dP, dS, i);
  wg.put_gradient(dS, i);
  wg.issue_keys(dS, i);
  wait_for<1>(wg.dV);
  wg.free_do(i);
  wait_for<0>(wg.dK);
  wg.free_q(i);
}

__device__ __forceinline__ void consume(Consumer& wg) {
  Operand dS;
  wg.wait_keys_and_values();
  {
    Scores S, dP;
    Operand P;
    wg.issue_scores(S, 0);
    wait_for<0>(S);
    wg.probabilities(S, 0);
    wg.weights(S, P);
    if constexpr (HEAD_DIM == 64) pin(P);
    wg.issue_products(dP, 0);
    wg.issue_values(P, 0);
    wait_for<1>(dP);
    wg.gradient(P, dP, dS, 0);
    wg.put_gradient(dS, 0);
    wg.issue_keys(dS, 0);
    wait_for<1>(wg.dV);
    wg.free_do(0);
    wait_for<0>(wg.dK);
    wg.free_q(0);
  }
  int i = 1;
#pragma unroll 1
  for (; i < wg.tile.blocks; ++i) step(wg, i, dS);
  Queries dQ;
  wg.wait_gradients(i - 1);
  wg.issue_queries(dQ, i - 1);
  wait_for<0>(dQ);
  wg.put_queries(dQ, i - 1);
  wg.meet();
  wg.store();
}

ATTENTION_BACKWARD
