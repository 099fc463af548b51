// FlashAttention-3 section 3.1, Algorithm 1: a producer warp loads by TMA, free-running consumer warpgroups compute by WGMMA.
#include "attention.cuh"

__device__ __forceinline__ void produce(Producer& load, const Tile& tile) {
  load.load_q(tile);
  for (int j = 0; j < tile.blocks; ++j) {
    load.load_k(tile, j);
    load.load_v(tile, j);
  }
}

__device__ __forceinline__ void consume(Consumer& wg) {
  Scores S;
  Weights P;
  wg.wait_q();
  for (int j = wg.first; j <= wg.last; ++j) {
    wg.issue_scores(S, j);
    wg.wait_scores<0>(S, j);
    wg.free_k(j);
    if (j == wg.last) wg.free_q();
    wg.softmax(j, S, P);
    wg.rescale();
    wg.issue_values(P, j);
    wg.wait_values<0>(j);
    wg.free_v(j);
  }
}

ATTENTION_FORWARD
