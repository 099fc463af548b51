// FlashAttention-3's backward (arXiv:2407.08608, appendix, and its source): S and dP together, dV under dS, dQ's way out under dK.
#include "gradients.cuh"

__device__ __forceinline__ void step(Consumer& wg, int i) {
  Scores S, dP;
  Operand P, dS;
  Queries dQ;
  Rows rows;
  wg.issue_scores(S, i);
  wg.issue_products(dP, i);
  wg.wait_scores<1>(S, i);
  wg.load_lse(rows, i);
  wg.probabilities(S, rows, i);
  pin(S);
  wg.wait_products<0>(dP, i);
  wg.load_delta(rows, i);
  wg.gradient(S, dP, rows, P, dS, i);
  wg.issue_values(P, i, i != wg.first);
  wg.put_gradient(dS, i);
  wg.share_gradient(i);
  wg.wait_gradients(i);
  wg.issue_queries(dQ, i);
  wg.wait_values<1>(i);
  wg.free_do(i);
  wg.issue_keys(dS, i, i != wg.first);
  wg.wait_queries<1>(dQ, i);
  wg.put_queries(dQ, i);
  wg.wait_keys<0>(i);
  wg.free_q(i);
}

__device__ __forceinline__ void consume(Consumer& wg) {
  wg.wait_k();
  wg.wait_v();
  wg.claim_outbox();
#pragma unroll 1
  for (int i = wg.first; i <= wg.last; ++i) step(wg, i);
  wg.free_k();
  wg.free_v();
  wg.store_values();
  wg.store_keys();
}

ATTENTION_BACKWARD
