// Every SM reads the same slices in the same order: `width` bytes, in boxes of 128 bytes by 128 rows, of each row of a matrix.
constexpr int BOX_BYTES = 128 * 128, BOX_COLS = 64;

extern "C" __global__ void read_slices(u64* out, const void* map, long long tiles, long long boxes, long long passes, long long stages) {
  extern __shared__ __align__(1024) unsigned char smem[];
  __shared__ u64 full[16];
  if (threadIdx.x) return;
  for (int i = 0; i < stages; ++i) mbarrier_init(&full[i], 1);
  fence_init();
  const int total = (int)(tiles * boxes * passes);
  int stage = 0, phase = 1, box = 0, tile = 0;
  u64 start = clock_wide();
  for (int i = 0; i < total + (int)stages; ++i) {
    if (i >= (int)stages) mbarrier_wait(&full[stage], phase);
    if (i < total) {
      mbarrier_expect(&full[stage], BOX_BYTES);
      tma_load(smem + stage * BOX_BYTES, map, &full[stage], box * BOX_COLS, tile * 128);
    }
    if (++box == (int)boxes) {
      box = 0;
      if (++tile == (int)tiles) tile = 0;
    }
    if (++stage == (int)stages) { stage = 0; phase ^= 1; }
  }
  out[blockIdx.x] = clock_wide() - start;
}
