// Online softmax on a warpgroup's score accumulator, in base 2, with the scale folded into one FMA.
// A thread of a WGMMA accumulator holds two rows, r and r + 8, of its warp's 16: element 4 g + {0, 1} are columns
// 8 g + 2 (lane % 4) + {0, 1} of row r, element 4 g + {2, 3} the same columns of row r + 8.
#pragma once
#include "ptx.cuh"

#define NEGATIVE_INFINITY __int_as_float(0xff800000)

__device__ __forceinline__ float quad_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
__device__ __forceinline__ float quad_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// Keep registers where they are, before or after the asynchronous WGMMAs that use them.
template <int N> __device__ __forceinline__ void hold(float (&x)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) asm volatile("" : "+f"(x[i])::"memory");
}

struct RowState {
  float top[2], sum[2], factor[2];  // running maximum (unscaled), this thread's share of the row sum, exp2(old - new maximum)

  __device__ __forceinline__ void start() {
#pragma unroll
    for (int r = 0; r < 2; ++r) top[r] = NEGATIVE_INFINITY, sum[r] = 0.0f;
  }

  // S becomes exp2(scale * (S - maximum)); maximum, sum and factor follow.
  template <int N> __device__ __forceinline__ void online(float (&S)[N], float scale, bool masked) {
    float shift[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float a = S[2 * r], b = S[2 * r + 1];
#pragma unroll
      for (int i = 4; i < N; i += 4) a = fmaxf(a, S[i + 2 * r]), b = fmaxf(b, S[i + 2 * r + 1]);
      const float high = quad_max(fmaxf(fmaxf(a, b), top[r]));
      // A row that has seen no key has maximum -inf; 0 in its place gives exp2(-inf) = 0 and not NaN.
      const float pivot = masked && high == NEGATIVE_INFINITY ? 0.0f : high;
      shift[r] = pivot * scale;
      factor[r] = exp2_approx(top[r] * scale - shift[r]);
      top[r] = high;
    }
#pragma unroll
    for (int i = 0; i < N; ++i) S[i] = exp2_approx(__fmaf_rn(S[i], scale, -shift[(i >> 1) & 1]));
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float a = S[2 * r], b = S[2 * r + 1];
#pragma unroll
      for (int i = 4; i < N; i += 4) a += S[i + 2 * r], b += S[i + 2 * r + 1];
      sum[r] = __fmaf_rn(sum[r], factor[r], a + b);
    }
  }

  template <int N> __device__ __forceinline__ void rescale(float (&O)[N]) const {
#pragma unroll
    for (int i = 0; i < N; ++i) O[i] *= factor[(i >> 1) & 1];
  }

  // O /= row sum; returns through `lse` the natural logarithm of the sum of exp(scale * S) of both rows.
  template <int N> __device__ __forceinline__ void normalize(float (&O)[N], float scale, float (&lse)[2]) {
    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float l = quad_sum(sum[r]);
      inverse[r] = l == 0.0f ? 0.0f : __frcp_rn(l);
      lse[r] = l == 0.0f ? NEGATIVE_INFINITY : (top[r] * scale + log2_approx(l)) * 0.6931471805599453f;
    }
#pragma unroll
    for (int i = 0; i < N; ++i) O[i] *= inverse[(i >> 1) & 1];
  }
};

// Columns at or past `limit`, counted from the block's first key, become -inf; one limit for each of the thread's rows.
template <int N> __device__ __forceinline__ void mask(float (&S)[N], int limit_low, int limit_high) {
  const int column = 2 * (lane_id() % 4);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    const int limit = ((i >> 1) & 1 ? limit_high : limit_low) - column;
    if (i / 4 * 8 + (i & 1) >= limit) S[i] = NEGATIVE_INFINITY;
  }
}

// The accumulator of S is already laid out as the A operand of P V: four registers per 16 keys.
template <int N> __device__ __forceinline__ void convert(u32 (&P)[N / 2], const float (&S)[N]) {
#pragma unroll
  for (int i = 0; i < N / 2; ++i) P[i] = pack<BF16>(S[2 * i], S[2 * i + 1]);
}
