// What `across` and `late` do with blocks of 80 queries, for want of registers: S and dP begin with what is subtracted from them, as
// prepare.cu lays it, and the last weights of dV wait in registers that GEMMs do not read.
#pragma once
#include "queries.cuh"

// GEMMs take no operand from the first 24 registers. Of dV so many k steps are issued behind dP, the others behind dS, in dP's place.
constexpr int FIRST_STEPS = BLOCK_M / 16 - 2;

// Each column of a block's scores begins with its query's statistic.
__device__ __forceinline__ void begin_with(Scores& S, const float* statistics) {
  const u32 at = smem_address(statistics) + lane_id() % 4 * 16;
#pragma unroll
  for (int g = 0; g < BLOCK_M / 8; g += 2) {
    float2 row[2];
    load_pairs(at + g * 32, row[0], row[1]);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      float* x = S + 4 * (g + h);
      x[0] = x[2] = row[h].x, x[1] = x[3] = row[h].y;
    }
  }
}
// Issue S - LSE / scale, or dP - delta.
__device__ __forceinline__ void issue_begun_scores(Consumer& wg, Scores& S, int i) {
  wg.shared.q.wait(i);
  begin_with(S, wg.shared.lse2[i % STAGES]);
  wg.issue_product<true>(S, wg.shared.K, wg.shared.Q[i % STAGES]);
  wg.stamp(Stamp::SCORES, i);
}
__device__ __forceinline__ void issue_begun_products(Consumer& wg, Scores& dP, int i) {
  wg.shared.dO_ring.wait(i);
  begin_with(dP, wg.shared.delta[i % STAGES]);
  wg.issue_product<true>(dP, wg.shared.V, wg.shared.dO[i % STAGES]);
  wg.stamp(Stamp::PRODUCTS, i);
}

// What a query does not see has no weight.
__device__ __forceinline__ void blank(const Consumer& wg, Operand& P) {
  int begin[2];
  wg.find_seen(begin);
#pragma unroll
  for (int e = 0; e < BLOCK_M / 4; ++e) {
    const int column = e / 2 * 8;
    if (column < begin[e & 1]) P[e] = column + 1 < begin[e & 1] ? 0 : P[e] & 0xffff0000u;
  }
}
// P = exp2(S), as an operand.
__device__ __forceinline__ void weights_of_begun(Consumer& wg, const Scores& S, Operand& P, int i) {
  const Params& p = wg.problem.p;
#pragma unroll
  for (int e = 0; e < BLOCK_M / 4; ++e) P[e] = pack<BF16>(exp2_approx(S[2 * e] * p.scale_log2), exp2_approx(S[2 * e + 1] * p.scale_log2));
  if constexpr (CAUSAL) {
    if (wg.m < wg.tile().masked[wg.rank]) blank(wg, P);
    if (++wg.m == p.m_tiles) wg.m = wg.tile().first;
  } else if (wg.tile().masked[wg.rank] > 0) {
    blank(wg, P);
  }
  wg.stamp(Stamp::PROBABILITIES, i);
  wg.trace.seek(i + 1);
}
// dS = P times dP - delta.
__device__ __forceinline__ void gradient_of_begun(Consumer& wg, const Operand& P, const Scores& difference, Operand& dS, int i) {
#pragma unroll
  for (int g = 0; g < BLOCK_M / 8; ++g) Consumer::gradient_of(P + 2 * g, difference + 4 * g, make_float2(0.0f, 0.0f), dS + 2 * g);
  wg.stamp(Stamp::GRADIENT, i);
}

// Issue dV += P^T dO[i] of the first k steps, or of the others; these as new values, or the compiler would make them operands at once.
__device__ __forceinline__ void issue_first_values(Consumer& wg, const Operand& P, int i, bool started) {
  wg.issue_sum<0, FIRST_STEPS>(wg.dV, P, wg.shared.dO[i % STAGES], started);
  wg.stamp(Stamp::VALUES, i);
}
__device__ __forceinline__ void issue_last_values(Consumer& wg, const Operand& P, const Operand& dS, int i) {
  Operand moved;
#pragma unroll
  for (int e = 4 * FIRST_STEPS; e < BLOCK_M / 4; ++e) moved[e] = P[e] & (dS[e] | 0x7fff7fffu);  // P, as no weight is negative; and not before dS
  wg.issue_sum<FIRST_STEPS, BLOCK_M / 16>(wg.dV, moved, wg.shared.dO[i % STAGES], true);
}
