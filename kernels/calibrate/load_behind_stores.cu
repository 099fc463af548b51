// Warpgroup 0 loads a word from shared memory whose address is the word before, and so waits for each, while 3 stores, if asked, and 1
// and 2 multiply (load_behind_stores.py). Its first warp alone, where `lone` is set.
template <int N1, Operand FROM1, int N2, Operand FROM2>
__device__ __forceinline__ void behind(u64* out, long long lone, long long store, long long gemms) {
  extern __shared__ __align__(1024) unsigned char smem[];
  volatile u32* stop = (volatile u32*)(smem + STOP_AT);
  fill_normal(smem, GEMM_SMEM_BYTES, blockIdx.x * 7919u);
  const u32 word = smem_address(smem + STORED_AT + STORED_BYTES);
  if (threadIdx.x == 0) {
    *stop = 0;
    asm volatile("st.shared.u32 [%0], %0;" :: "r"(word) : "memory");
  }
  __syncthreads();
  const int warpgroup = threadIdx.x / 128;
  long long done = 0;
  float keep = 0.0f;
  u64 start = clock_wide(), end = start;
  if (warpgroup == 0) {
    while (clock_wide() - start < 4000) {}  // let the queue fill
    start = clock_wide();
    u32 at = word;
#pragma unroll 1
    for (; clock_wide() - start < CYCLES; ) {
      if (!lone || threadIdx.x < 32) {
#pragma unroll
        for (int k = 0; k < 16; ++k) asm volatile("ld.volatile.shared.u32 %0, [%0];" : "+r"(at) :: "memory");
        done += 16;
      }
    }
    keep = (float)at;
    end = clock_wide();
    *stop = 1;
  } else if (warpgroup == 3) {
    const u32 to = smem_address(smem + STORED_AT);
    if (store == STS64) store_on<STS64>(to, stop, end, done);
    if (store == STS128) store_on<STS128>(to, stop, end, done);
    if (store == STSM) store_on<STSM>(to, stop, end, done);
  } else if (warpgroup == 1) {
    keep = multiply<N1, FROM1>(smem, warpgroup, gemms, stop, end, done);
  } else {
    keep = multiply<N2, FROM2>(smem, warpgroup, gemms, stop, end, done);
  }
  if (keep == 1.2345f) out[0] = 1;
  if (threadIdx.x % 32 == 0) {
    u64* slot = out + 2 * ((long long)blockIdx.x * (blockDim.x / 32) + threadIdx.x / 32);
    slot[0] = end - start;
    slot[1] = done;
  }
}
#define BEHIND(NAME, N1, FROM1, N2, FROM2)                                                                                         \
  extern "C" __global__ void __launch_bounds__(512, 1) NAME(u64* out, long long lone, long long store, long long gemms) {         \
    behind<N1, FROM1, N2, FROM2>(out, lone, store, gemms);                                                                        \
  }
