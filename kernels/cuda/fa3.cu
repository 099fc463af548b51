// FlashAttention-3, sections 3.1 and 3.2 together: pingpong between warpgroups and two-stage overlap within each.
// Beside overlap_2stage.cu, the baton brackets the issue of the two GEMMs.
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
    wg.turn.take();
    wg.issue_scores(j);
    wg.issue_values(j - 1);
    wg.turn.give();  // the tensor cores are yours; I do softmax
    wg.wait_scores<1>(j);
    wg.free_k(j);
    wg.softmax(tile, j);  // under P V of block j-1 and the other warpgroup's GEMMs
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
