// Three-stage overlap inside a warpgroup (FlashAttention-3 appendix B.3): softmax under both GEMMs. Beside overlap_2stage.cu,
// S of block j+1 is already issued while block j is in its softmax; two S accumulators are live at once.
#include "attention.cuh"

typedef float Scores[BLOCK_N / 2];

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

// Block j, whose S is in flight: P V of the block before, S of the block after (unless this is the last), and softmax under both.
template <bool LAST> __device__ __forceinline__ void step(Consumer& wg, const Tile& tile, Scores& S, Scores& next, int j) {
  wg.wait_scores<0>(S, j);
  wg.free_k(j);
  wg.issue_values(j - 1);
  if (!LAST) wg.issue_scores(next, j + 1);
  wg.softmax(tile, S, j);
  wg.wait_values<LAST ? 0 : 1>(j - 1);
  wg.free_v(j - 1);
  wg.convert_p(S);
  wg.rescale_o();
}

__device__ __forceinline__ void consume(Consumer& wg, const Tile& tile) {
  const int last = tile.blocks - 1;
  Scores other;
  wg.wait_q();
  wg.issue_scores(0);
  if (last > 0) {
    wg.issue_scores(other, 1);
    wg.wait_scores<1>(0);
  } else {
    wg.wait_scores<0>(0);
  }
  wg.free_k(0);
  wg.softmax(tile, 0);
  wg.convert_p();
  int j = 1;
  for (; j + 1 < last; j += 2) {  // two at a time: the two accumulators change roles
    step<false>(wg, tile, other, wg.S, j);
    step<false>(wg, tile, wg.S, other, j + 1);
  }
  if (j < last) {
    step<false>(wg, tile, other, wg.S, j);
    step<true>(wg, tile, wg.S, other, j + 1);
  } else if (j == last) {
    step<true>(wg, tile, other, wg.S, j);
  }
  wg.issue_values(last);
  wg.wait_values<0>(last);
  wg.free_v(last);
}

ATTENTION_FORWARD
