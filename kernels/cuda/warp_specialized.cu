// FlashAttention-3 section 3.1, Algorithm 1: a producer warp loads by TMA, free-running consumer warpgroups compute by WGMMA.
#include "attention.cuh"

__device__ __forceinline__ void produce(Producer& load, const Tile& tile) {
  load.load_q(tile);
  for (int j = 0; j < tile.blocks; ++j) {
    load.load_k(tile, j);
    load.load_v(tile, j);
  }
}

__device__ __forceinline__ void consume(Consumer& wg, const Tile& tile) {
  wg.wait_q();
  for (int j = 0; j < tile.blocks; ++j) {
    wg.issue_scores(j);
    wg.wait_scores<0>(j);
    wg.free_k(j);
    wg.softmax(tile, j);
    wg.convert_p();
    wg.rescale_o();
    wg.issue_values(j);
    wg.wait_values<0>(j);
    wg.free_v(j);
  }
}

ATTENTION_FORWARD
