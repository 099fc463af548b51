// FlashAttention-3 for e4m3, whose softmax lasts longer than its GEMMs. Beside ../fa3.cu, S of a block is multiplied in two halves, so
// that softmax of the lower begins while the upper is multiplied, and P V of the block before is issued between the two, when the
// queue of the tensor cores has room: a warp that issues into a full one waits.
#include "attention.cuh"

__device__ __forceinline__ void produce(Producer& load, const Tile& tile) {
  load.load_q(tile);
  load.load_k(tile, 0);
  for (int j = 1; j < tile.blocks; ++j) {
    load.load_k(tile, j);
    load.load_v(tile, j - 1);
  }
  load.load_v(tile, tile.blocks - 1);
}

// Block j: softmax of its lower half under the GEMM of its upper, then the upper half under P V of the block before.
__device__ __forceinline__ void step(Consumer& wg, int j, const Weights& P, Weights& next) {
  Scores S;
  wg.take(j);
  wg.issue_scores_in_halves(S, j);
  wg.give(j);
  const bool begun = wg.begin_softmax(j, S, next);
  wg.wait_scores<0>(S, j);
  wg.free_k(j);
  if (j == wg.last) wg.free_q();
  wg.issue_values(P, j - 1);
  wg.end_softmax(j, S, next, begun);
  wg.wait_values<0>(j - 1);
  wg.free_v(j - 1);
  wg.rescale();
}

__device__ __forceinline__ void finish(Consumer& wg, const Weights& P) {
  wg.issue_values(P, wg.last);
  wg.wait_values<0>(wg.last);
  wg.free_v(wg.last);
}

__device__ __forceinline__ void consume(Consumer& wg) {
  Scores S;
  Weights P, other;
  int j = wg.first;
  wg.wait_q();
  wg.issue_scores(S, j);
  wg.wait_scores<0>(S, j);
  wg.free_k(j);
  if (j == wg.last) wg.free_q();
  wg.softmax(j, S, P);
  for (++j; j < wg.last; j += 2) {  // two at a time: P of one block is still read while the next is written
    step(wg, j, P, other);
    step(wg, j + 1, other, P);
  }
  if (j == wg.last) {
    step(wg, j, P, other);
    finish(wg, other);
  } else {
    finish(wg, P);
  }
}

ATTENTION_FORWARD
