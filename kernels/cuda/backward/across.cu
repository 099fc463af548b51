// 80 queries: beside apart.cu, blocks of 80, as GEMMs of 64 columns with A in shared memory ask for more than it gives. A GEMM has 64
// rows, so dQ is formed across, dQ^T = K^T dS^T. How that fits the registers is in begun.cuh; dV and dK leave by V's place.
#define DQ_APART 1
#include "begun.cuh"

// Block i.
template <bool LAST> __device__ __forceinline__ void step(Consumer& wg, int i, bool started) {
  Scores S, dP;
  Operand P, dS;
  issue_begun_scores(wg, S, i);
  wg.wait_scores<0>(S, i);
  if (LAST) wg.free_k();
  weights_of_begun(wg, S, P, i);
  pin(P);
  if (!started) wg.wait_v();
  issue_begun_products(wg, dP, i);
  issue_first_values(wg, P, i, started);
  wg.claim_gradient(i);
  wg.wait_products<1>(dP, i);
  gradient_of_begun(wg, P, dP, dS, i);
  wg.put_gradient(dS, i);
  wg.share_gradient(i);
  issue_last_values(wg, P, dS, i);
  wg.issue_keys(dS, i, started);
  wg.wait_values<1>(i);
  wg.free_do(i);
  if constexpr (LAST) wg.store_values();
  wg.wait_keys<0>(i);
  wg.free_q(i);
}

__device__ __forceinline__ void consume(Consumer& wg) {
  bool started = false;
  wg.wait_k();
#pragma unroll 1
  for (int i = wg.first; i < wg.last; ++i) {
    if (SKIPS && wg.rank == 1 && wg.unseen()) {
      wg.skip(i);
    } else {
      step<false>(wg, i, started);
      started = true;
    }
  }
  step<true>(wg, wg.last, started);  // whether any query sees it or not
  wg.store_keys();
  wg.free_v_stored();
}

#include "entry.cuh"
ATTENTION_BACKWARD
