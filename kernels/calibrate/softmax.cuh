// The online softmax of one 64 x N score tile held as wgmma accumulators, in the phases that the model counts.
// A thread holds two rows (r = 0, 1) of N / 4 scores each; the four threads of a quad share a row.
enum Phase { MAX = 1, EXP = 2, SUM = 4, CONVERT = 8, RESCALE = 16, ALL = 31 };

__device__ __forceinline__ float exp2_fast(float x) { float y; asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x)); return y; }
__device__ __forceinline__ u32 pack_fp16(float high, float low) { u32 y; asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low)); return y; }

template <int N, int D, int PHASES> struct OnlineSoftmax {
  float s[N / 2], o[D / 2], row_max[2], row_sum[2];

  __device__ __forceinline__ void start(u32 seed) {
#pragma unroll
    for (int i = 0; i < N / 2; ++i) s[i] = (float)(hash(seed + i * 977u) >> 8) * (1.0f / 16777216.0f);
#pragma unroll
    for (int i = 0; i < D / 2; ++i) o[i] = (float)(hash(seed + i * 613u) >> 8) * (1.0f / 16777216.0f);
    row_max[0] = row_max[1] = 0.5f + (float)(seed & 1) * 0.1f;
    row_sum[0] = row_sum[1] = 0.0f;
  }

  // Results stay in `s`, so the next step depends on this one at no cost: exp2 in place, and the packed pairs of
  // fp16 reread as the bits of an fp32 score (finite, far under 1).
  __device__ __forceinline__ void step(float scale) {
    float alpha[2] = {1.0f, 1.0f};
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (PHASES & MAX) {
        float before = row_max[r], m = before;
#pragma unroll
        for (int i = 0; i < N / 8; ++i) { m = fmaxf(m, s[4 * i + 2 * r]); m = fmaxf(m, s[4 * i + 2 * r + 1]); }
        m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 2));
        m = fmaxf(m, __shfl_xor_sync(0xffffffffu, m, 1));
        row_max[r] = m;
        alpha[r] = exp2_fast((before - m) * scale);
        row_sum[r] *= alpha[r];
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if (PHASES & EXP) {
        float shift = row_max[r] * scale;
#pragma unroll
        for (int i = 0; i < N / 8; ++i) {
          s[4 * i + 2 * r] = exp2_fast(s[4 * i + 2 * r] * scale - shift);
          s[4 * i + 2 * r + 1] = exp2_fast(s[4 * i + 2 * r + 1] * scale - shift);
        }
      }
    }
    if (PHASES & SUM) {
#pragma unroll
      for (int r = 0; r < 2; ++r)
#pragma unroll
        for (int i = 0; i < N / 8; ++i) { row_sum[r] += s[4 * i + 2 * r]; row_sum[r] += s[4 * i + 2 * r + 1]; }
    }
    if (PHASES & CONVERT) {
#pragma unroll
      for (int i = 0; i < N / 4; ++i) s[2 * i] = __uint_as_float(pack_fp16(s[2 * i + 1], s[2 * i]));
    }
    if (PHASES & RESCALE) {
      if (!(PHASES & MAX)) alpha[0] = alpha[1] = scale;
#pragma unroll
      for (int i = 0; i < D / 2; ++i) o[i] *= alpha[(i >> 1) & 1];
    }
  }

  __device__ __forceinline__ float total() {
    float t = row_max[0] + row_max[1] + row_sum[0] + row_sum[1];
#pragma unroll
    for (int i = 0; i < N / 2; ++i) t += s[i];
#pragma unroll
    for (int i = 0; i < D / 2; ++i) t += o[i];
    return t;
  }
};
