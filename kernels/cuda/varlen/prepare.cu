// What the attention kernel needs of a packed batch, before it starts: the sequences in the order of their tiles, tensor maps of
// each, and rows of no sequence cleared. CTA 0 lists the sequences, all the others write maps, a warp each.
#include "sequences.cuh"

constexpr int THREADS = 512;
constexpr int BUCKETS = 512;  // sequences are ordered by their keys to 1 in 512 of the longest

struct Batch {
  const int *cu_q, *cu_k;  // batch + 1 each
  u64 addresses[4], row_bytes[4];
  TensorMap* maps;
  Sequence* sequences;
  int *tiles, *queue;
  float* lse;
  int batch, heads, sharing, block_m, columns;  // columns: of a row of O, all heads
  int total_q, total_k;
  int section_keys;  // keys of one head whose K and V are as many bytes as are walked together
};

struct Rows {
  int start, count;
};
// Where a sequence lies, within the tensor whatever cu_seqlens says.
__device__ __forceinline__ Rows rows_of(const int* cu, int i, int total) {
  const int start = min(max(cu[i], 0), total), end = min(max(cu[i + 1], start), total);
  return {start, end - start};
}

__device__ __forceinline__ int section_of(const Batch& b, int keys) {
  const int fit = max(1, b.section_keys / max(keys, 1));
  return min(b.heads, (1 << (31 - __clz(min(fit, 1 << 15)))) * b.sharing);
}

__device__ void list(const Batch& b) {
  __shared__ int bucket[BUCKETS], longest, total;
  const int thread = threadIdx.x;
  bucket[thread] = 0;
  if (thread == 0) longest = 1, total = 0, b.queue[0] = 0, b.queue[1] = 0;
  __syncthreads();
  for (int i = thread; i < b.batch; i += THREADS) atomicMax(&longest, rows_of(b.cu_k, i, b.total_k).count);
  __syncthreads();
  const float scale = (BUCKETS - 1) / (float)longest;
  auto bucket_of = [&](int keys) { return BUCKETS - 1 - (int)(keys * scale); };  // the longest in the first
  for (int i = thread; i < b.batch; i += THREADS) atomicAdd(&bucket[min(bucket_of(rows_of(b.cu_k, i, b.total_k).count), BUCKETS - 1)], 1);
  __syncthreads();
  // Counts become first places: an inclusive scan, less what the bucket holds.
  const int held = bucket[thread];
  for (int step = 1; step < BUCKETS; step *= 2) {
    const int before = thread >= step ? bucket[thread - step] : 0;
    __syncthreads();
    bucket[thread] += before;
    __syncthreads();
  }
  bucket[thread] -= held;
  __syncthreads();
  for (int i = thread; i < b.batch; i += THREADS) {
    const Rows q = rows_of(b.cu_q, i, b.total_q), k = rows_of(b.cu_k, i, b.total_k);
    const int m_tiles = (q.count + b.block_m - 1) / b.block_m;
    const int place = atomicAdd(&bucket[min(bucket_of(k.count), BUCKETS - 1)], 1);
    b.sequences[place] = Sequence{0, i, m_tiles, section_of(b, k.count), q.count, k.count, q.start};
  }
  __syncthreads();
  // Tiles are numbered through in that order, THREADS sequences at a time.
  for (int from = 0; from < b.batch; from += THREADS) {
    const int i = from + thread, own = i < b.batch ? b.sequences[i].m_tiles * b.heads : 0;
    bucket[thread] = own;
    __syncthreads();
    for (int step = 1; step < THREADS; step *= 2) {
      const int before = thread >= step ? bucket[thread - step] : 0;
      __syncthreads();
      bucket[thread] += before;
      __syncthreads();
    }
    if (i < b.batch) b.sequences[i].first = total + bucket[thread] - own;
    __syncthreads();
    if (thread == THREADS - 1) total += bucket[thread];
    __syncthreads();
  }
  if (thread == 0) *b.tiles = total;
}

__device__ __forceinline__ void write_map(const Batch& b, int operand, int sequence, const TensorMap& whole, TensorMap& staged, Rows rows) {
  const int lane = threadIdx.x % 32;
  reinterpret_cast<u32*>(&staged)[lane] = reinterpret_cast<const u32*>(&whole)[lane];
  __syncwarp();
  const u32 at = smem_address(&staged);
  if (lane == 0) {
    asm volatile("tensormap.replace.tile.global_address.shared::cta.b1024.b64 [%0], %1;" ::"r"(at),
                 "l"(b.addresses[operand] + (u64)rows.start * b.row_bytes[operand])
                 : "memory");
    asm volatile("tensormap.replace.tile.global_dim.shared::cta.b1024.b32 [%0], 1, %1;" ::"r"(at), "r"(max(rows.count, 1)) : "memory");
  }
  __syncwarp();
  asm volatile("tensormap.cp_fenceproxy.global.shared::cta.tensormap::generic.release.gpu.sync.aligned [%0], [%1], 128;" ::"l"(
                   b.maps + operand * b.batch + sequence),
               "r"(at)
               : "memory");
}

// O = 0 and LSE = -inf in rows before the first sequence and after the last.
__device__ void clear(const Batch& b, int thread, int threads) {
  const Rows first = rows_of(b.cu_q, 0, b.total_q), last = rows_of(b.cu_q, b.batch - 1, b.total_q);
  const int end = last.start + last.count, outside = first.start + b.total_q - end;
  for (int i = thread / 32; i < outside; i += threads / 32) {
    const int row = i < first.start ? i : end + i - first.start;
    u32* o = reinterpret_cast<u32*>(b.addresses[3] + (u64)row * b.row_bytes[3]);
    for (int column = thread % 32; column < b.columns / 2; column += 32) o[column] = 0;
    for (int head = thread % 32; head < b.heads; head += 32) b.lse[(u64)head * b.total_q + row] = __int_as_float(0xff800000);
  }
}

extern "C" __global__ void __launch_bounds__(THREADS)
    prepare_sequences(const __grid_constant__ TensorMap q, const __grid_constant__ TensorMap k, const __grid_constant__ TensorMap v,
                      const __grid_constant__ TensorMap o, const __grid_constant__ Batch b) {
  if (blockIdx.x == 0) {
    list(b);
    return;
  }
  __shared__ alignas(128) TensorMap staged[THREADS / 32][4];
  const int warp = threadIdx.x / 32, warps = THREADS / 32 * (gridDim.x - 1);
  for (int i = (blockIdx.x - 1) * (THREADS / 32) + warp; i < b.batch; i += warps) {
    const Rows queries = rows_of(b.cu_q, i, b.total_q), keys = rows_of(b.cu_k, i, b.total_k);
    write_map(b, 0, i, q, staged[warp][0], queries);
    write_map(b, 1, i, k, staged[warp][1], keys);
    write_map(b, 2, i, v, staged[warp][2], keys);
    write_map(b, 3, i, o, staged[warp][3], queries);
    __syncwarp();
  }
  clear(b, (blockIdx.x - 1) * THREADS + threadIdx.x, THREADS * (gridDim.x - 1));
}
