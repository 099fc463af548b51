// Pingpong (FlashAttention-3 section 3.1): one warpgroup's softmax hides under the other's GEMMs. Beside warp_specialized.cu the
// baton is the idea: a warpgroup holds the turn from its second GEMM of one block to its first GEMM of the next.
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
  wg.take(wg.first, Label::OPEN);
  for (int j = wg.first; j <= wg.last; ++j) {
    wg.issue_scores(S, j);
    wg.give(j);  // the tensor cores are yours; I do softmax
    wg.wait_scores<0>(S, j);
    wg.free_k(j);
    if (j == wg.last) wg.free_q();
    wg.softmax(j, S, P);
    wg.rescale();
    wg.take(j);
    wg.issue_values(P, j);
    wg.wait_values<0>(j);
    wg.free_v(j);
  }
  wg.give(wg.last, Label::CLOSE);
}

ATTENTION_FORWARD
