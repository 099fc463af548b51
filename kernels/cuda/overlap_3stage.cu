// Three-stage overlap inside a warpgroup (FlashAttention-3 appendix B.3): softmax under both GEMMs. Beside overlap_2stage.cu,
// S of block j+1 is already issued while block j is in its softmax; two S accumulators are live at once.
#include "attention.cuh"

// At head dim 256 both warpgroups settle in step, softmax beside softmax and GEMM beside GEMM; turns keep them half a block apart.
constexpr bool IN_TURNS = HEAD_DIM == 256;

__device__ __forceinline__ void produce(Producer& load, const Tile& tile) {
  load.load_q(tile);
  load.load_k(tile, 0);
  if (tile.blocks > 1) load.load_k(tile, 1);
  for (int j = 2; j < tile.blocks; ++j) {
    load.load_v(tile, j - 2);
    load.load_k(tile, j);
  }
  if (tile.blocks > 1) load.load_v(tile, tile.blocks - 2);
  load.load_v(tile, tile.blocks - 1);
}

// Block j, whose S is there: issue P V of the block before and S of the block after (unless this is the last), do softmax of this
// one under both, and wait for both: nothing is in flight from one step to the next, or the compiler would serialise it all.
template <bool LAST>
__device__ __forceinline__ void step(Consumer& wg, int j, Scores& S, Scores& next, const Weights& P, Weights& mine) {
  if (IN_TURNS) wg.take(j);
  wg.issue_values(P, j - 1);
  if (!LAST) wg.issue_scores(next, j + 1);
  if (IN_TURNS) wg.give(j);
  wg.softmax(j, S, mine);
  wg.wait_values<LAST ? 0 : 1>(j - 1);
  wg.free_v(j - 1);
  if (!LAST) {
    wg.wait_scores<0>(next, j + 1);
    wg.free_k(j + 1);
    if (j + 1 == wg.last) wg.free_q();
  }
  wg.rescale();
}

__device__ __forceinline__ void finish(Consumer& wg, const Weights& P) {
  wg.issue_values(P, wg.last);
  wg.wait_values<0>(wg.last);
  wg.free_v(wg.last);
}

__device__ __forceinline__ void consume(Consumer& wg) {
  Scores even, odd;  // S of the first block, the third, ... and of the second, the fourth, ...
  Weights P, Q;      // and their P
  int j = wg.first;
  wg.wait_q();
  wg.issue_scores(even, j);
  wg.wait_scores<0>(even, j);
  wg.free_k(j);
  if (j == wg.last) {
    wg.free_q();
    wg.softmax(j, even, P);
    finish(wg, P);
    return;
  }
  wg.issue_scores(odd, j + 1);
  wg.softmax(j, even, P);  // under S of the second block
  ++j;
  wg.wait_scores<0>(odd, j);
  wg.free_k(j);
  if (j == wg.last) wg.free_q();
  for (; j + 1 < wg.last; j += 2) {
    step<false>(wg, j, odd, even, P, Q);
    step<false>(wg, j + 1, even, odd, Q, P);
  }
  if (j < wg.last) {
    step<false>(wg, j, odd, even, P, Q);
    step<true>(wg, j + 1, even, odd, Q, P);
    finish(wg, P);
  } else {
    step<true>(wg, j, odd, even, P, Q);
    finish(wg, Q);
  }
}

ATTENTION_FORWARD
