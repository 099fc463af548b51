// dQ apart: beside lagged.cu, a third warpgroup forms dQ from both consumers' dS and puts it, so that the consumers wait neither for one
// another nor for dQ's way out: three that drift keep the tensor cores busy.
#define DQ_APART 1
#include "queries.cuh"

// At head_dim 64 registers hold S of the next block beside dS, and dP beside a half of S: S is issued behind dK, ahead of the wait for
// it, and dP amid the exponentials.
constexpr bool AHEAD = HEAD_DIM == 64;

// Block i, whose S is in work, if AHEAD; then S of the next is.
template <bool LAST> __device__ __forceinline__ void step(Consumer& wg, int i, Scores& S, bool started) {
  Scores dP;
  Operand P, dS;
  Rows rows;
  if constexpr (!AHEAD) wg.issue_scores(S, i);
  wg.load_lse(rows, i);
  wg.wait_scores<0>(S, i);
  if (LAST) wg.free_k();
  if constexpr (AHEAD) {
    wg.exponents(S, rows);
    wg.weights_of_half<0>(S, P, i);
    if (!started) wg.wait_v();
    wg.issue_products(dP, i);
    wg.weights_of_half<1>(S, P, i);
  } else {
    wg.probabilities(S, rows, i);
    wg.weights(S, P);
    pin(P);
    if (!started) wg.wait_v();
    wg.issue_products(dP, i);
  }
  wg.issue_values(P, i, started);
  wg.load_delta(rows, i);
  wg.claim_gradient(i);
  wg.wait_products<1>(dP, i);
  if (LAST) wg.free_v();
  wg.gradient(P, dP, rows, dS, i);
  wg.put_gradient(dS, i);
  wg.share_gradient(i);
  wg.issue_keys(dS, i, started);
  wg.wait_values<1>(i);
  wg.free_do(i);
  if constexpr (LAST) wg.store_values();
  if constexpr (AHEAD && !LAST) wg.issue_scores(S, i + 1);
  wg.wait_keys<AHEAD && !LAST>(i);
  wg.free_q(i);
}

__device__ __forceinline__ void consume(Consumer& wg) {
  Scores S;
  bool started = false;
  wg.wait_k();
  if constexpr (AHEAD) wg.issue_scores(S, wg.first);
#pragma unroll 1
  for (int i = wg.first; i < wg.last; ++i) {
    if (SKIPS && wg.rank == 1 && wg.unseen()) {
      wg.skip(i);
    } else {
      step<false>(wg, i, S, started);
      started = true;
    }
  }
  step<true>(wg, wg.last, S, started);  // whether any query sees it or not
  wg.store_keys();
}

#include "entry.cuh"
ATTENTION_BACKWARD
