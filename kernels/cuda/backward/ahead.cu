// Scores ahead: beside lagged.cu, a block's S is issued behind dK of the block before and ahead of the wait for it, and dP amid the
// exponentials, once the block before's dQ is out of the registers that dP takes: a warpgroup alone has a GEMM running under all that
// it does but a half of the exponentials and the putting of dQ. At head_dim 128; at 64 S does not fit beside dS and dQ.
#include "gradients.cuh"

// dK and dQ of the block before, and block i as far as dV.
__device__ __forceinline__ void step(Consumer& wg, int i, Operand& dS, bool started) {
  Scores S, dP;
  Operand P;
  Queries dQ;
  Rows rows;
  wg.issue_keys(dS, i - 1, started);
  wg.issue_scores(S, i);
  wg.wait_keys<1>(i - 1);
  wg.free_q(i - 1);
  wg.load_lse(rows, i);
  wg.wait_gradients(i - 1);
  wg.issue_queries(dQ, i - 1);
  wg.wait_scores<1>(S, i);
  wg.exponents(S, rows);
  wg.weights_of_half<0>(S, P, i);
  wg.wait_queries<0>(dQ, i - 1);
  wg.put_queries(dQ, i - 1);
  wg.issue_products(dP, i);
  wg.weights_of_half<1>(S, P, i);
  wg.issue_values(P, i, true);
  wg.load_delta(rows, i);
  wg.wait_products<1>(dP, i);
  wg.gradient(P, dP, rows, dS, i);
  wg.put_gradient(dS, i);
  wg.share_gradient(i);
  wg.wait_values<0>(i);
  wg.free_do(i);
}

// The first block of a tile, which has none before.
__device__ __forceinline__ void start(Consumer& wg, int i, Operand& dS) {
  Scores S, dP;
  Operand P;
  Rows rows;
  wg.issue_scores(S, i);
  wg.load_lse(rows, i);
  wg.wait_scores<0>(S, i);
  wg.probabilities(S, rows, i);
  wg.weights(S, P);
  pin(P);
  wg.wait_v();
  wg.issue_products(dP, i);
  wg.issue_values(P, i, false);
  wg.claim_outbox();
  wg.load_delta(rows, i);
  wg.wait_products<1>(dP, i);
  wg.gradient(P, dP, rows, dS, i);
  wg.put_gradient(dS, i);
  wg.share_gradient(i);
  wg.wait_values<0>(i);
  wg.free_do(i);
}

// dK and dQ of the last block.
__device__ __forceinline__ void finish(Consumer& wg, const Operand& dS, bool started) {
  Queries dQ;
  wg.free_v();
  wg.issue_keys(dS, wg.last, started);
  wg.wait_gradients(wg.last);
  wg.issue_queries(dQ, wg.last);
  wg.store_values();
  wg.wait_keys<1>(wg.last);
  wg.free_q(wg.last);
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
  for (int i = wg.first + 1; i <= wg.last; ++i) step(wg, i, dS, i > wg.first + 1);
  finish(wg, dS, wg.last > wg.first);
}

ATTENTION_BACKWARD
