// FlashAttention-3's backward (arXiv:2407.08608, appendix, and its source): S and dP together, dV under dS, dQ's way out under dK.
#include "gradients.cuh"

__device__ __forceinline__ void step(Consumer& wg, int i) {
  Scores S, dP;
  Operand P, dS;
  Queries dQ;
  wg.issue_scores(S, i);
  wg.issue_products(dP, i);
  wait_for<1>(S);
  wg.probabilities(S, i);
  pin(S);
  wait_for<0>(dP);
  wg.gradient(S, dP, P, dS, i);
  wg.issue_values(P, i);
  wg.put_gradient(dS, i);
  wg.wait_gradients(i);
  wg.issue_queries(dQ, i);
  wait_for<1>(wg.dV);
  wg.free_do(i);
  wg.issue_keys(dS, i);
  wait_for<1>(dQ);
  wg.put_queries(dQ, i);
  wait_for<0>(wg.dK);
  wg.free_q(i);
}

__device__ __forceinline__ void consume(Consumer& wg) {
  wg.wait_keys_and_values();
#pragma unroll 1
  for (int i = 0; i < wg.tile.blocks; ++i) step(wg, i);
  wg.meet();
  wg.store();
}

ATTENTION_BACKWARD
