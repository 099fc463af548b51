// Warpgroup 0 repeats a pattern and 3 stores to shared memory, each if asked, beside the GEMMs of 1 and 2, which may differ in kind
// (beside_stores.py). All run until warpgroup 0 has seen CYCLES go by.
constexpr int CYCLES = 60000, REGISTERS = 16;
constexpr int STORED_AT = GEMM_SMEM_BYTES, STORED_BYTES = 16 * 1024, STOP_AT = STORED_AT + 2 * STORED_BYTES;
enum Pattern { NO_PATTERN, EX2, FFMA_EX2, F2FP, LDS, LDS_SHARED };
enum Store { NO_STORES, STS64, STS128, STSM };

// 64 copies of a pattern. LDS: 16 bytes a lane; LDS_SHARED: the same 64 bytes for all quads of lanes, as statistics are read.
template <int PATTERN> __device__ __forceinline__ void copies(float (&x)[REGISTERS], float a, float b, u32 from) {
#pragma unroll
  for (int c = 0; c < 64; ++c) {
    float& y = x[c % REGISTERS];
    if (PATTERN == EX2 || PATTERN == FFMA_EX2) asm volatile("ex2.approx.ftz.f32 %0, %0;" : "+f"(y));
    if (PATTERN == FFMA_EX2) asm volatile("fma.rn.ftz.f32 %0, %0, %1, %2;" : "+f"(x[(c + 8) % REGISTERS]) : "f"(a), "f"(b));
    if (PATTERN == F2FP) asm volatile("{ .reg .b32 t; cvt.rn.f16x2.f32 t, %0, %1; mov.b32 %0, t; }" : "+f"(y) : "f"(a));
    if (PATTERN == LDS || PATTERN == LDS_SHARED) {
      float4& z = reinterpret_cast<float4&>(x[c * 4 % REGISTERS]);
      asm volatile("ld.volatile.shared.v4.f32 {%0, %1, %2, %3}, [%4];"
                   : "=f"(z.x), "=f"(z.y), "=f"(z.z), "=f"(z.w) : "r"(from + c % 8 * (PATTERN == LDS ? 2048 : 64)) : "memory");
    }
  }
}
template <int PATTERN> __device__ __forceinline__ float repeat(u64 start, u32 from, long long& done) {
  float x[REGISTERS], kept = 0.0f, a = 0.3f + (float)from * 1e-7f, b = 0.7f;
  for (int c = 0; c < REGISTERS; ++c) x[c] = 0.1f + 0.01f * (float)(threadIdx.x + c);
#pragma unroll 1
  for (; clock_wide() - start < CYCLES; done += 64) copies<PATTERN>(x, a, b, from);
  for (int c = 0; c < REGISTERS; ++c) kept += x[c];
  return kept;
}

// 16 KiB of a warpgroup: sums of 64 x 64 by 8 bytes as the accumulators lie, 32 bytes of a row at their number xor the row's; 16 bytes a
// lane; or four 8 x 8 matrices of 16 bits at a time.
template <int STORE> __device__ __forceinline__ void store_all(u32 to, u32 value) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % 4;
  if (STORE == STS64) {
    const u32 at = to + (warp * 16 + lane / 4) * 256 + lane / 4 * 32 + lane % 4 * 8;
#pragma unroll
    for (int g = 0; g < 8; ++g) {
      asm volatile("st.shared.v2.u32 [%0], {%1, %1};" :: "r"(at ^ g * 32), "r"(value) : "memory");
      asm volatile("st.shared.v2.u32 [%0], {%1, %1};" :: "r"((at ^ g * 32) + 8 * 256), "r"(value) : "memory");
    }
  } else {
    const u32 at = to + warp * 4096 + lane * 16;
#pragma unroll
    for (int k = 0; k < 8; ++k) {
      if (STORE == STS128) asm volatile("st.shared.v4.u32 [%0], {%1, %1, %1, %1};" :: "r"(at + k * 512), "r"(value) : "memory");
      if (STORE == STSM)
        asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %1, %1, %1};" :: "r"(at + k * 512), "r"(value) : "memory");
    }
  }
}
template <int STORE> __device__ __forceinline__ void store_on(u32 to, volatile u32* stop, u64& end, long long& done) {
#pragma unroll 1
  while (*stop == 0) {
    store_all<STORE>(to, (u32)done);
    ++done;
    end = clock_wide();
  }
}

// Eight k steps at a time, waited for.
template <int N, Operand FROM>
__device__ __forceinline__ float multiply(unsigned char* smem, int warpgroup, long long gemms, volatile u32* stop, u64& end, long long& done) {
  Accumulator<N> c;
  Fragments f;
  c.clear();
  if (FROM == RS) f.load(smem);
  const u64 a = a_descriptor(smem, warpgroup), b = b_descriptor<N, FROM>(smem);
#pragma unroll 1
  for (long long i = 0; i < gemms; ++i) {
    issue_gemm<N, 8, FROM, false>(c, f, a, b, 1, nullptr);
    wgmma_wait<0>();
    if (*stop == 0) { ++done; end = clock_wide(); }
  }
  return c.sum();
}

// out: (CTA, warp, [cycles, units]): copies of the pattern, GEMMs of two warpgroups, and 16 KiB (by 8 bytes) or 16 KiB stored.
template <int N1, Operand FROM1, int N2, Operand FROM2>
__device__ __forceinline__ void beside(u64* out, long long pattern, long long store, long long gemms) {
  extern __shared__ __align__(1024) unsigned char smem[];
  volatile u32* stop = (volatile u32*)(smem + STOP_AT);
  fill_normal(smem, GEMM_SMEM_BYTES, blockIdx.x * 7919u);
  if (threadIdx.x == 0) *stop = 0;
  __syncthreads();
  const int warpgroup = threadIdx.x / 128;
  long long done = 0;
  float keep = 0.0f;
  u64 start = clock_wide(), end = start;
  if (warpgroup == 0) {
    while (clock_wide() - start < 4000) {}  // let the queue fill
    start = clock_wide();
    const u32 from = smem_address(smem + STORED_AT + STORED_BYTES) + (pattern == LDS_SHARED ? threadIdx.x % 4 : threadIdx.x % 128) * 16;
    if (pattern == EX2) keep = repeat<EX2>(start, from, done);
    else if (pattern == FFMA_EX2) keep = repeat<FFMA_EX2>(start, from, done);
    else if (pattern == F2FP) keep = repeat<F2FP>(start, from, done);
    else if (pattern == LDS) keep = repeat<LDS>(start, from, done);
    else if (pattern == LDS_SHARED) keep = repeat<LDS_SHARED>(start, from, done);
    else while (clock_wide() - start < CYCLES) {}
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
#define BESIDE(NAME, N1, FROM1, N2, FROM2)                                                                                         \
  extern "C" __global__ void __launch_bounds__(512, 1) NAME(u64* out, long long pattern, long long store, long long gemms) {      \
    beside<N1, FROM1, N2, FROM2>(out, pattern, store, gemms);                                                                     \
  }
