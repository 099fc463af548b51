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

// Weights are first taken from the maximum of the blocks before, so that no exponential waits for this block's maximum. A thread's
// share of the block's row sum bounds its weights: while it stays below LIMIT they fit fp16 and lose nothing, and neither the
// maximum nor O has to change. Only a block that passes LIMIT (or holds inf or NaN) looks for its maximum and starts again.
constexpr float LIMIT = 1024.0f;

struct RowState {
  float top[2], sum[2], factor[2];  // the maximum in use (unscaled), this thread's share of the row sum, exp2(old - new maximum)

  __device__ __forceinline__ void start() {
#pragma unroll
    for (int r = 0; r < 2; ++r) top[r] = NEGATIVE_INFINITY, sum[r] = 0.0f;
  }

  // P = exp2(scale * (S - top)) as the A operand of P V: four registers per 16 keys. Whether O has to be rescaled.
  template <int N> __device__ __forceinline__ bool online(const float (&S)[N], u32 (&P)[N / 2], float scale, bool first, bool masked) {
    float block[2];
    if (!first) {
      const float shift[2] = {top[0] * scale, top[1] * scale};
      weights(S, P, scale, shift, block);
      const bool within = block[0] <= LIMIT && block[1] <= LIMIT;
      // The branch also keeps the exponentials before the next wait for a WGMMA, which the compiler would move them past.
      if (__all_sync(0xffffffffu, within)) {
        sum[0] += block[0], sum[1] += block[1];
        return false;
      }
    }
    exact(S, P, scale, masked);
    return true;
  }

  // The same from this block's own maximum.
  template <int N> __device__ __forceinline__ void exact(const float (&S)[N], u32 (&P)[N / 2], float scale, bool masked) {
    float shift[2], block[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float a = S[2 * r], b = S[2 * r + 1];
#pragma unroll
      for (int i = 4; i < N; i += 4) a = fmaxf(a, S[i + 2 * r]), b = fmaxf(b, S[i + 2 * r + 1]);
      const float high = fmaxf(quad_max(fmaxf(a, b)), top[r]);
      // A row that has seen no key has maximum -inf; 0 in its place gives exp2(-inf) = 0 and not NaN.
      const float pivot = masked && high == NEGATIVE_INFINITY ? 0.0f : high;
      shift[r] = pivot * scale;
      factor[r] = exp2_approx(top[r] * scale - shift[r]);
      top[r] = high;
    }
    weights(S, P, scale, shift, block);
#pragma unroll
    for (int r = 0; r < 2; ++r) sum[r] = __fmaf_rn(sum[r], factor[r], block[r]);
  }

  // exp2(scale * S - shift) in the operand type, and their sums over the thread's columns.
  template <int N>
  static __device__ __forceinline__ void weights(const float (&S)[N], u32 (&P)[N / 2], float scale, const float (&shift)[2], float (&total)[2]) {
    float a[2] = {0.0f, 0.0f}, b[2] = {0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < N; i += 2) {
      const int r = (i >> 1) & 1;
      const float x = exp2_approx(__fmaf_rn(S[i], scale, -shift[r])), y = exp2_approx(__fmaf_rn(S[i + 1], scale, -shift[r]));
      a[r] += x, b[r] += y;
      P[i / 2] = pack<BF16>(x, y);
    }
    total[0] = a[0] + b[0], total[1] = a[1] + b[1];
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
      inverse[r] = l == 0.0f ? 0.0f : reciprocal_approx(l);
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
