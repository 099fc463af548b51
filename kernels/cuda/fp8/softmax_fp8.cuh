// Online softmax whose weights are e4m3: softmax.cuh's, with the exponent shifted so that they fill the type's range.
#pragma once
#include "ptx_fp8.cuh"
#include "softmax.cuh"

constexpr float LARGEST = 448.0f;  // e4m3
constexpr int LINE_KEYS = APPROXIMATE > 0 ? APPROXIMATE : 16;
static_assert(LINE_KEYS == 8 || LINE_KEYS == 16, "a thread has two keys of every 8");

// What the numbers of a block stand for, beside Q's: a score is `scores` times the product of the bytes, in base 2; V's scale is
// taken into P, 2^lift at the maximum in use, and out of the row sum by `sums`.
struct Scales {
  float scores, lift, sums;
};

// A weight at the maximum in use is 2^SHIFT; e4m3 ends at 448, so a maximum may grow by a factor 448 / 2^SHIFT before O has to be
// rescaled, and weights down to 2^-(6 + SHIFT) of the largest keep their three bits. `top` is that of scale * S + lift - SHIFT.
struct RowStateFp8 : RowState {
  // P = exp2(scale * S + lift - top) as the A operand of P V: four registers per 32 keys. Whether O has to be rescaled.
  template <int N> __device__ __forceinline__ bool online(const float (&S)[N], u32 (&P)[N / 4], const Scales& by, bool first, bool masked) {
    float block[2];
    if (!first) {
      const float shift[2] = {top[0] - by.lift, top[1] - by.lift};
      const bool on_line = weights<(APPROXIMATE > 0)>(S, P, by.scores, shift, block);
      // A thread's share of the row sum bounds its weights. Only where that does not do are the bytes looked at.
      const bool within = on_line && block[0] <= LARGEST && block[1] <= LARGEST;
      // The branch also keeps the exponentials before the next wait for a WGMMA, which the compiler would move them past.
      if (__all_sync(0xffffffffu, within) || __all_sync(0xffffffffu, on_line && !saturated(P))) {
#pragma unroll
        for (int r = 0; r < 2; ++r) sum[r] = __fmaf_rn(block[r], by.sums, sum[r]);
        return false;
      }
    }
    exact(S, P, by, masked);
    return true;
  }

  // Whether any weight is 448, the largest e4m3, or NaN: adding 2 carries both, and nothing below, into the sign that no weight has.
  template <int M> static __device__ __forceinline__ bool saturated(const u32 (&P)[M]) {
    u32 signs = 0;
#pragma unroll
    for (int i = 0; i < M; ++i) signs |= P[i] + 0x02020202u;
    return signs & 0x80808080u;
  }

  // The same from this block's own maximum.
  template <int N> __device__ __forceinline__ void exact(const float (&S)[N], u32 (&P)[N / 4], const Scales& by, bool masked) {
    float shift[2], block[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float a = S[2 * r], b = S[2 * r + 1];
#pragma unroll
      for (int i = 4; i < N; i += 4) a = fmaxf(a, S[i + 2 * r]), b = fmaxf(b, S[i + 2 * r + 1]);
      const float high = fmaxf(__fmaf_rn(quad_max(fmaxf(a, b)), by.scores, by.lift - SHIFT), top[r]);
      // A row that has seen no key has maximum -inf; 0 in its place gives exp2(-inf) = 0 and not NaN.
      const float pivot = masked && high == NEGATIVE_INFINITY ? 0.0f : high;
      factor[r] = exp2_approx(top[r] - pivot);
      shift[r] = pivot - by.lift;
      top[r] = high;
    }
    weights<false>(S, P, by.scores, shift, block);
#pragma unroll
    for (int r = 0; r < 2; ++r) sum[r] = __fmaf_rn(sum[r], factor[r], block[r] * by.sums);
  }

  // exp2(scale * S - shift) in e4m3, and their sums over the thread's columns. Register 2 m + r has the thread's keys
  // 16 m + {0, 1, 8, 9} + 2 (lane % 4) of row r, which is the order that the transposed V has (Transposer). With LINES every second
  // APPROXIMATE keys have theirs from lines, while MUFU has the others'; false where one is above 2^9 or NaN, and so is no weight.
  template <bool LINES, int N>
  static __device__ __forceinline__ bool weights(const float (&S)[N], u32 (&P)[N / 4], float scale, const float (&shift)[2], float (&total)[2]) {
    float a[2] = {0.0f, 0.0f}, b[2] = {0.0f, 0.0f};
    const float slope = scale * (-1.0f / 256.0f);
    const float offset[2] = {__fmaf_rn(shift[0], 1.0f / 256.0f, 0.5f + 9.0f / 256.0f), __fmaf_rn(shift[1], 1.0f / 256.0f, 0.5f + 9.0f / 256.0f)};
    u32 positions = 0xffffffffu;
#pragma unroll
    for (int m = 0; m < N / 8; ++m)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float w[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float s = S[8 * m + 2 * r + i / 2 * 4 + i % 2];
          if (LINES && (16 * m + i / 2 * 8) / LINE_KEYS % 2 == 1) {
            const u32 position = line_position(s, slope, offset[r]);
            positions &= position;
            w[i] = line_weight(position);
          } else {
            w[i] = exp2_approx(__fmaf_rn(s, scale, -shift[r]));
          }
        }
        a[r] += w[0], b[r] += w[1];
        a[r] += w[2], b[r] += w[3];
        P[2 * m + r] = pack_e4m3(w[0], w[1], w[2], w[3]);
      }
    total[0] = a[0] + b[0], total[1] = a[1] + b[1];
    return !LINES || (positions & 0x3f000000u) == 0x3f000000u;  // all in [1/2, 1]
  }

  // O *= value_scale / row sum; returns through `lse` the natural logarithm of the sum of exp(scale * S) of both rows.
  template <int N> __device__ __forceinline__ void normalize(float (&O)[N], float value_scale, float (&lse)[2]) {
    float inverse[2];
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      const float l = quad_sum(sum[r]);
      inverse[r] = l == 0.0f ? 0.0f : reciprocal_approx(l) * value_scale;
      lse[r] = l == 0.0f ? NEGATIVE_INFINITY : (top[r] - SHIFT + log2_approx(l)) * 0.6931471805599453f;
    }
#pragma unroll
    for (int i = 0; i < N; ++i) O[i] *= inverse[(i >> 1) & 1];
  }
};
