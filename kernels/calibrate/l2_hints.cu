// Every SM reads the same slices of rows again and again, and amid them boxes of its own, once, that it also writes elsewhere.
constexpr int BOX_BYTES = 128 * 128, BOX_COLS = 64;

__device__ __forceinline__ void tma_load_hinted(void* to, const void* map, u64* b, int col, int row, u64 hint) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.tile.mbarrier::complete_tx::bytes.L2::cache_hint "
               "[%0], [%1, {%3, %4}], [%2], %5;"
               :: "r"(smem_address(to)), "l"(map), "r"(smem_address(b)), "r"(col), "r"(row), "l"(hint) : "memory");
}

// A pass has tiles x boxes loads of what is kept, and `reads` and `writes` of what passes, spread evenly among them.
extern "C" __global__ void keep_and_pass(u64* out, const void* kept, const void* read, const void* written, long long tiles,
                                         long long boxes, long long passes, long long reads, long long writes, long long stages,
                                         long long kept_hint, long long passing_hint) {
  extern __shared__ __align__(1024) unsigned char smem[];
  __shared__ u64 full[16];
  if (threadIdx.x) return;
  for (int i = 0; i < stages; ++i) mbarrier_init(&full[i], 1);
  fence_init();
  const int loads = (int)(tiles * boxes + reads), total = loads * (int)passes;
  int stage = 0, phase = 1, box = 0, tile = 0, place = 0, mine = 0, sent = 0;
  u64 start = clock_wide();
  for (int i = 0; i < total + (int)stages; ++i) {
    if (i >= (int)stages) mbarrier_wait(&full[stage], phase);
    if (i < total) {
      mbarrier_expect(&full[stage], BOX_BYTES);
      bool passes_by = (long long)(place + 1) * reads / loads > (long long)place * reads / loads;
      bool sends = (long long)(place + 1) * writes / loads > (long long)place * writes / loads;
      if (passes_by) {
        tma_load_hinted(smem + stage * BOX_BYTES, read, &full[stage], 0, (mine++ * (int)gridDim.x + (int)blockIdx.x) * 128, passing_hint);
      } else {
        tma_load_hinted(smem + stage * BOX_BYTES, kept, &full[stage], box * BOX_COLS, tile * 128, kept_hint);
        if (++box == (int)boxes) {
          box = 0;
          if (++tile == (int)tiles) tile = 0;
        }
      }
      if (sends) {
        tma_store(written, smem + (int)stages * BOX_BYTES, 0, (sent++ * (int)gridDim.x + (int)blockIdx.x) * 128);
        tma_commit();
      }
      if (++place == loads) place = 0;
    }
    if (++stage == (int)stages) { stage = 0; phase ^= 1; }
  }
  tma_wait_written();
  out[blockIdx.x] = clock_wide() - start;
}
