// dQ a block behind, and late: beside lagged.cu, a block's dQ is formed under the writing of the next block's dS and leaves under its
// dK, whose operand is in registers, so that shared memory has room for the stores.
#define BY_TURNS 1
#include "gradients.cuh"

// Block i, and dQ of the block before.
__device__ __forceinline__ void step(Consumer& wg, int i, Operand& dS) {
  Scores S, dP;
  Operand P;
  Queries dQ;
  Rows rows;
  wg.turn.take();
  wg.issue_scores(S, i);
  wg.load_lse(rows, i);
  wg.wait_scores<0>(S, i);
  wg.probabilities(S, rows, i);
  wg.weights(S, P);
  pin(P);
  wg.issue_products(dP, i);
  wg.issue_values(P, i, true);
  wg.turn.give();
  wg.load_delta(rows, i);
  wg.wait_products<1>(dP, i);
  wg.gradient(P, dP, rows, dS, i);
  wg.wait_gradients(i - 1);
  wg.issue_queries(dQ, i - 1);
  wg.put_gradient(dS, i);
  wg.issue_keys(dS, i, true);
  wg.wait_values<2>(i);
  wg.free_do(i);
  wg.wait_queries<1>(dQ, i - 1);
  wg.share_gradient(i);
  wg.put_queries(dQ, i - 1);
  wg.wait_keys<0>(i);
  wg.free_q(i);
}

// The first block of a tile, which has no dQ to form.
__device__ __forceinline__ void start(Consumer& wg, int i, Operand& dS) {
  Scores S, dP;
  Operand P;
  Rows rows;
  wg.turn.take();
  wg.issue_scores(S, i);
  wg.load_lse(rows, i);
  wg.wait_scores<0>(S, i);
  wg.probabilities(S, rows, i);
  wg.weights(S, P);
  pin(P);
  wg.wait_v();
  wg.issue_products(dP, i);
  wg.issue_values(P, i, false);
  wg.turn.give();
  wg.claim_outbox();
  wg.load_delta(rows, i);
  wg.wait_products<1>(dP, i);
  wg.gradient(P, dP, rows, dS, i);
  wg.put_gradient(dS, i);
  wg.share_gradient(i);
  wg.issue_keys(dS, i, false);
  wg.wait_values<1>(i);
  wg.free_do(i);
  wg.wait_keys<0>(i);
  wg.free_q(i);
}

__device__ __forceinline__ void finish(Consumer& wg) {
  Queries dQ;
  wg.free_v();
  wg.wait_gradients(wg.last);
  wg.issue_queries(dQ, wg.last);
  wg.store_values();
  wg.wait_queries<0>(dQ, wg.last);
  wg.free_k();
  wg.put_queries(dQ, wg.last);
  wg.store_keys();
}

__device__ __forceinline__ void consume(Consumer& wg) {
  Operand dS;
  wg.wait_k();
  start(wg, wg.first, dS);
#pragma unroll 1
  for (int i = wg.first + 1; i <= wg.last; ++i) step(wg, i, dS);
  finish(wg);
}

ATTENTION_BACKWARD
