// Two-stage overlap inside a warpgroup (FlashAttention-3 section 3.2, Algorithm 2). Beside warp_specialized.cu the order of issue
// is the idea: S of block j is issued before O += P V of block j-1, so softmax runs while that product is on the tensor cores.
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

__device__ __forceinline__ void consume(Consumer& wg, const Tile& tile) {
  wg.wait_q();
  wg.issue_scores(0);
  wg.wait_scores<0>(0);
  wg.free_k(0);
  wg.softmax(tile, 0);
  wg.convert_p();
  for (int j = 1; j < tile.blocks; ++j) {
    wg.issue_scores(j);
    wg.issue_values(j - 1);
    wg.wait_scores<1>(j);
    wg.free_k(j);
    wg.softmax(tile, j);  // under P V of block j-1
    wg.wait_values<0>(j - 1);
    wg.free_v(j - 1);
    wg.convert_p();
    wg.rescale_o();
  }
  wg.issue_values(tile.blocks - 1);
  wg.wait_values<0>(tile.blocks - 1);
  wg.free_v(tile.blocks - 1);
}

ATTENTION_FORWARD
